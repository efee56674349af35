// Keeps the GPU panel up to date. The server sends pieces of the page when something has changed; seconds are counted
// here. Nothing is asked for while nobody looks.
() => {
  if (window.gpuPanel) return;
  let pieces = {}, since = Date.now(), source = null, live = false;

  const seconds = s =>
    s < 120 ? `${Math.round(s)} s` : s < 7200 ? `${Math.round(s / 60)} min` : `${(s / 3600).toFixed(1)} h`;

  // Gradio makes elements anew, for example when an accordion is opened: each knows what it shows.
  const draw = () => {
    for (const place of document.querySelectorAll("[data-gpu]")) {
      const html = pieces[place.dataset.gpu] ?? "";
      if (place.shown !== html) place.innerHTML = place.shown = html;
    }
  };
  const count = () => {
    const passed = (Date.now() - since) / 1000;
    for (const time of document.querySelectorAll("[data-gpu] time"))
      time.textContent = seconds(Math.max(0, +time.dataset.s + time.dataset.way * passed));
  };
  const show = fresh => {
    pieces = fresh;
    since = Date.now();
    draw();
  };
  const close = () => { source?.close(); source = null; };
  const open = () => {
    close();
    source = new EventSource("gpu/panel");
    source.addEventListener("news", event => { live = true; show(JSON.parse(event.data)); });
    source.onerror = () => {
      if (live) show({...pieces, line: pieces.lost});
      if (source?.readyState !== EventSource.CLOSED) return;  // it tries again by itself
      close();
      // Where the page is part of somebody's own app, there may be no stream: then the button is asked now and then.
      setTimeout(() => {
        if (document.hidden || source) return;
        live ? open() : (document.querySelector("#gpu-refresh")?.click(), open());
      }, 3000);
    };
  };
  window.gpuPanel = {show, open};
  document.addEventListener("visibilitychange", () => document.hidden ? close() : open());
  setInterval(() => { draw(); count(); }, 1000);
  open();
}
