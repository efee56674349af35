// Keeps the GPU panel up to date: asks the server once a second whether it has anything new, which costs next to nothing,
// and counts seconds by itself. Nothing is asked for while nobody looks. (Not a stream of events: browsers allow six
// standing lines to a server, over all tabs, and Gradio has one for each tab.)
() => {
  if (window.gpuPanel) return;
  const FRESH_MS = 10000;  // how old what only the driver knows (free memory, power) may be
  let pieces = {}, version = null, since = 0, moving = false, asking = false;

  const seconds = s =>
    s < 120 ? `${Math.round(s)} s` : s < 7200 ? `${Math.round(s / 60)} min`
      : s < 172800 ? `${(s / 3600).toFixed(1)} h` : `${Math.round(s / 86400)} d`;

  // Gradio makes elements anew, for example when an accordion is opened: each knows what it shows.
  const draw = () => {
    for (const place of document.querySelectorAll("[data-gpu]")) {
      const html = pieces[place.dataset.gpu] ?? "";
      if (place.shown !== html) place.innerHTML = place.shown = html;
    }
    const passed = (Date.now() - since) / 1000;
    for (const time of document.querySelectorAll("[data-gpu] time"))
      time.textContent = seconds(Math.max(0, +time.dataset.s + time.dataset.way * passed));
  };
  const show = fresh => {
    pieces = fresh;
    since = Date.now();
    draw();
  };
  const ask = async () => {
    if (document.hidden || asking) return;
    asking = true;
    try {
      const known = version !== null && Date.now() - since < FRESH_MS ? `?known=${version}` : "";
      const answer = await fetch(`gpu/panel${known}`);
      if (answer.status === 200) {
        const news = await answer.json();
        ({version, moving} = news);
        show(news.pieces);
      } else if (answer.status === 404 && document.querySelector("#gpu-refresh")) {
        // The page is part of somebody's own app, which has no such call: then the button does it.
        document.querySelector("#gpu-refresh").click();
      }
    } catch {
      version = null;
      show({...pieces, line: pieces.lost});
    }
    asking = false;
  };
  window.gpuPanel = {show};
  document.addEventListener("visibilitychange", ask);
  setInterval(() => { draw(); ask(); }, 1000);
  setInterval(() => { if (moving) ask(); }, 250);
  ask();
}
