// Uploads files of any MIME type: Gradio silently drops files that are not audio, and browsers report audio in mp4, webm
// and 3gp as video, or other formats without a type. The server checks the content.
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
