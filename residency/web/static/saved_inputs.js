// Stores the inputs of a page in its tab, and restores them after a reload (ui/saved_inputs.py).

const stored = () => JSON.parse(sessionStorage.getItem("inputs") ?? "{}");

// Stores only the length of the history, from which `secrets` detects whether results were lost.
function keep(prompt, target, recording, task, subTask, history) {
  const back = window.textsBack;  // Gradio writes them into their fields a moment later
  const emptied = id => document.activeElement?.closest(id);
  if (back && !emptied("#prompt-text")) prompt ||= back.prompt;
  if (back && !emptied("#target-text")) target ||= back.target;
  const before = window.inputs ?? {};
  window.inputs = {prompt, target, recording: recording?.path ?? null, task, subTask, steps: history?.length ?? 0};
  if (window.keepsInputs) {
    sessionStorage.setItem("inputs", JSON.stringify(window.inputs));
    return;
  }
  // The stored inputs are not restored yet: only what was filled in on this page replaces them, also if emptied again.
  const now = {prompt, target, recording: window.inputs.recording};
  const filled = Object.entries(now).filter(([name, value]) => value || before[name]);
  sessionStorage.setItem("inputs", JSON.stringify({...stored(), ...Object.fromEntries(filled)}));
}

function read() {
  const {recording, task, subTask} = stored();
  return JSON.stringify([recording ?? null, task ?? null, subTask ?? null]);
}

// Texts that are filled in already are newer than stored ones.
function restoreTexts(prompt, target) {
  const kept = stored();
  const texts = {prompt: prompt || (kept.prompt ?? ""), target: target || (kept.target ?? "")};
  window.textsBack = texts;
  setTimeout(() => { window.textsBack = null; }, 200);
  window.keepsInputs = true;
  const recording = window.inputs?.recording ?? kept.recording ?? null;
  sessionStorage.setItem("inputs", JSON.stringify({...kept, ...texts, recording}));
  return [texts.prompt, texts.target];
}

// Returns the secrets of this page's session, the newest first, and whether it has inputs that can be lost.
// A reloaded page continues its session. A page opened from the browser's history continues a session only if the page
// of that session was left: a duplicated tab opens in the same way, with a copy of the storage of a tab that is still
// open; it then deletes the copied inputs. A page may be reloaded before the server has responded to, or received, its
// secret: so the browser generates the secret, and keeps earlier ones until there is a response.
function secrets() {
  const way = document.wasDiscarded ? "reload" : performance.getEntriesByType("navigation")[0]?.type;
  const earlier = sessionStorage.getItem({reload: "visit", back_forward: "left"}[way]);
  const bytes = [...crypto.getRandomValues(new Uint8Array(16))];
  const secret = bytes.map(byte => byte.toString(16).padStart(2, "0")).join("");
  const all = [secret, ...(earlier ?? "").split(" ").slice(0, 3)].join(" ").trim();
  sessionStorage.setItem("visit", all);
  sessionStorage.removeItem("left");
  if (earlier === null) sessionStorage.removeItem("inputs");
  const {recording, steps} = stored();
  return [all, recording || steps ? "something" : ""];
}
