// Updates the GPU panel: polls the server once a second, which is cheap without changes, and counts seconds locally.
// Does not poll while the page is hidden. (No event stream: browsers permit six connections to a server over all tabs,
// and Gradio uses one for each tab.)
() => {
  if (window.gpuPanel) return;
  const FRESH_MS = 10000;  // maximum age of values that do not change the version (free memory, power)
  const ANSWERED_MS = 8000;  // request timeout
  let news = {pieces: {}, version: null, moving: false, outcomes: {}}, since = 0, polling = false;
  let pressed = null;  // the line about the last press, and the models whose outcome is pending

  const seconds = s =>
    s < 120 ? `${Math.round(s)} s` : s < 7200 ? `${Math.round(s / 60)} min`
      : s < 172800 ? `${(s / 3600).toFixed(1)} h` : `${Math.round(s / 86400)} d`;

  // Gradio recreates elements, for example when an accordion is opened: each stores its own content.
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
  // Replaces the line about a pending move by its outcome.
  const settle = () => {
    if (!pressed?.awaits.length || news.moving || news.version === null || news.version < pressed.version) return;
    const outcomes = pressed.awaits.map(name => news.outcomes[name]);  // null: pending; undefined: the model is gone
    if (!outcomes.includes(null)) pressed = {line: outcomes.join(""), awaits: []};
  };
  const show = fresh => {
    news = fresh;
    since = Date.now();
    settle();
    draw();
  };
  const showOutcome = press => {
    pressed = press;
    settle();
    draw();
  };
  const poll = async () => {
    if (document.hidden || polling) return;
    polling = true;
    try {
      const known = news.version !== null && Date.now() - since < FRESH_MS ? `?known=${news.version}` : "";
      const answer = await fetch(`gpu/panel${known}`, {signal: AbortSignal.timeout(ANSWERED_MS)});
      if (answer.status === 200) {
        show(await answer.json());
      } else if (answer.status === 404 && document.querySelector("#gpu-refresh")) {
        // The page is embedded in another app, which has no such route: uses the button instead.
        document.querySelector("#gpu-refresh").click();
      } else if (answer.status !== 204) {
        throw answer;  // for example from a proxy while the app is down
      }
    } catch (problem) {
      if (pressed) pressed.version = 0;  // a restarted server counts versions anew
      const line = problem.status === 401 ? news.pieces.strange : news.pieces.lost;
      show({...news, version: null, pieces: {...news.pieces, line}});
    }
    polling = false;
  };
  // Returns the half of an error of the API, "English / Chinese", in the language of the messages.
  const translated = text => {
    const chinese = /^zh\b/i.test(navigator.languages.find(each => /^(zh|en)\b/i.test(each)));
    const halves = /^(.+?) \/ ([^]*[\u4e00-\u9fff][^]*)$/.exec(text);
    return halves ? halves[chinese ? 2 : 1] : text;
  };
  // A button of a neighbour: the server answers once the neighbour has.
  const ask = async button => {
    button.disabled = true;
    const body = JSON.stringify({url: button.dataset.neighbor});
    try {
      const answer = await fetch("gpu/neighbors/ask", {method: "POST", body});
      const text = document.createElement("p");
      if (!answer.ok) text.textContent = translated((await answer.json().catch(() => ({}))).error ?? `${answer.status}`);
      showOutcome({line: answer.ok ? news.pieces.asked : text.outerHTML, awaits: []});
    } catch {
      showOutcome({line: news.pieces.lost, awaits: []});
    }
    news.version = null;
    button.disabled = false;
    poll();
  };
  document.addEventListener("click", event => {
    const button = event.target.closest("[data-gpu] [data-neighbor]");
    if (button) ask(button);
  });
  window.gpuPanel = {show, showOutcome};
  document.addEventListener("visibilitychange", poll);
  // A new request clears the line about the last press. (A Gradio event would arrive only after the request.)
  document.addEventListener("click", event => { if (event.target.closest("#clone, #edit, #clone-edit")) showOutcome(null); });
  setInterval(() => { draw(); poll(); }, 1000);
  setInterval(() => { if (news.moving) poll(); }, 250);
  poll();
}
