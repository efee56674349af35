// What happens to a recording in the browser while the server checks and transcribes it (ui/recording_check.py,
// ui/transcription.py). Both take seconds, in which the recording may be removed or replaced.

const unchanged = {__type__: "update"};
const file = path => ({path, meta: {_type: "gradio.FileData"}});

// Shows the outcome of the check: the converted recording, or a message instead of it.
function showChecked(checked, recording) {
  if (!recording || recording.path !== checked?.given) return [unchanged, unchanged];
  if (checked.message) return [null, checked.message];
  if (!checked.playable) return [unchanged, unchanged];
  const path = checked.playable, route = recording.url.slice(0, recording.url.indexOf("file=") + 5);
  const url = route + path.split("/").map(encodeURIComponent).join("/");
  return [{...file(path), url, orig_name: path.split("/").pop()}, unchanged];
}

// The tab stores the path of the recording in progress, so that a reloaded page requests its transcription again.
// Gradio has not restored the recording at that moment.
function beginTranscription(recording) {
  window.transcribes = true;  // so that it is not asked for twice, if the page is still loading
  sessionStorage.setItem("transcribing", recording.path);
}

function resumeTranscription(prompt) {
  const path = window.transcribes ? null : sessionStorage.getItem("transcribing");
  return [path && file(path), prompt];
}

function endTranscription() {
  sessionStorage.removeItem("transcribing");
}

// Does not overwrite a text that was written meanwhile; ignores recordings that were removed or replaced.
function showTranscript(result, text, recording) {
  if (!recording || !result?.recordings.includes(recording.path)) return [unchanged, unchanged];
  endTranscription();
  return [text && text.trim() ? unchanged : result.text, result.message || unchanged];
}
