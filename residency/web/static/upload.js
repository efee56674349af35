// Has files uploaded whatever the browser says their kind is: Gradio drops what is not called audio without a word, and
// browsers call recordings of sound in mp4, webm and 3gp videos, and others nothing. The server looks into the file.
() => {
  const inputOf = (target) => target.closest?.("#prompt-audio")?.querySelector("input[type=file]");
  const asAudio = (files) => {
    const transfer = new DataTransfer();
    for (const file of files) {
      const type = file.type.startsWith("audio/") ? file.type : "audio/unknown";
      transfer.items.add(new File([file], file.name, {type}));
    }
    return transfer.files;
  };
  const before = (event, listen) =>
    document.addEventListener(event, (event) => {
      const input = inputOf(event.target);
      if (input) listen(input, event);
    }, true);
  before("click", (input) => { input.accept = "audio/*,video/mp4,video/webm,video/3gpp,.m4a,.aac,.amr,.caf"; });
  before("change", (input, event) => { if (event.target === input) input.files = asAudio(input.files); });
  before("drop", (input, event) => {
    if ([...event.dataTransfer.files].every((file) => file.type.startsWith("audio/"))) return;
    event.preventDefault();
    event.stopPropagation();
    event.target.dispatchEvent(new DragEvent("dragleave", {bubbles: true}));
    input.files = asAudio(event.dataTransfer.files);
    input.dispatchEvent(new Event("change", {bubbles: true}));
  });
}
