// Keeps the GPU panel up to date: asks the server once a second whether it has anything new, which costs next to nothing,
// and counts seconds by itself. Nothing is asked for while nobody looks. (Not a stream of events: browsers allow six
// standing lines to a server, over all tabs, and Gradio has one for each tab.)
() => {
  if (window.gpuPanel) return;
  const FRESH_MS = 10000;  // how old what only the driver knows (free memory, power) may be
  const ANSWERED_MS = 8000;  // a line on which nothing has come for so long is dead, though nobody has said so
  let news = {pieces: {}, version: null, moving: false, outcomes: {}}, since = 0, asking = false;
  let pressed = null;  // the line about the last press, and the models of which it tells what is still to come

  const seconds = s =>
    s < 120 ? `${Math.round(s)} s` : s < 7200 ? `${Math.round(s / 60)} min`
      : s < 172800 ? `${(s / 3600).toFixed(1)} h` : `${Math.round(s / 86400)} d`;

  // Gradio makes elements anew, for example when an accordion is opened: each knows what it shows.
  const draw = () => {
    const shown = {...news.pieces, pressed: pressed?.line};
    for (const place of document.querySelectorAll("[data-gpu]")) {
      const html = shown[place.dataset.gpu] ?? "";
      if (place.shown !== html) place.innerHTML = place.shown = html;
    }
    const passed = (Date.now() - since) / 1000;
    for (const time of document.querySelectorAll("[data-gpu] time"))
      time.textContent = seconds(Math.max(0, +time.dataset.s + time.dataset.way * passed));
  };
  // What was to come has come, or has failed: what came of it takes the place of what was promised.
  const settle = () => {
    if (!pressed?.awaits.length || news.moving || news.version === null || news.version < pressed.version) return;
    const outcomes = pressed.awaits.map(name => news.outcomes[name]);  // null: not yet; undefined: the model is gone
    if (!outcomes.includes(null)) pressed = {line: outcomes.join(""), awaits: []};
  };
  const show = fresh => {
    news = fresh;
    since = Date.now();
    settle();
    draw();
  };
  const say = press => {
    pressed = press;
    settle();
    draw();
  };
  const ask = async () => {
    if (document.hidden || asking) return;
    asking = true;
    try {
      const known = news.version !== null && Date.now() - since < FRESH_MS ? `?known=${news.version}` : "";
      const answer = await fetch(`gpu/panel${known}`, {signal: AbortSignal.timeout(ANSWERED_MS)});
      if (answer.status === 200) {
        show(await answer.json());
      } else if (answer.status === 404 && document.querySelector("#gpu-refresh")) {
        // The page is part of somebody's own app, which has no such call: then the button does it.
        document.querySelector("#gpu-refresh").click();
      } else if (answer.status !== 204) {
        throw answer;  // of a proxy before an app that is away, for example
      }
    } catch (problem) {
      if (pressed) pressed.version = 0;  // who answers next may have begun to count anew
      const line = problem.status === 401 ? news.pieces.strange : news.pieces.lost;
      show({...news, version: null, pieces: {...news.pieces, line}});
    }
    asking = false;
  };
  window.gpuPanel = {show, say};
  document.addEventListener("visibilitychange", ask);
  // A new request makes the last press an old story. (An event of Gradio's would come when the request has ended.)
  document.addEventListener("click", event => { if (event.target.closest("#clone, #edit")) say(null); });
  setInterval(() => { draw(); ask(); }, 1000);
  setInterval(() => { if (news.moving) ask(); }, 250);
  ask();
}
