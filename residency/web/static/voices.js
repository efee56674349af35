// The list of voices (ui/voices.py).

// Returns null instead of the voice that is chosen already: Gradio calls this also when the list is closed.
function choose(name, target) {
  const again = name === (window.chosenVoice ?? null);
  settle(name);
  return [again ? null : name, target];
}

// Stores which voice the list shows.
function settle(name) {
  window.chosenVoice = name;
  return [];
}

// Another recording takes the place of the voice: clears the list, and hides the button that deletes a voice.
function unchoose() {
  settle(null);
  return [null, {__type__: "update", visible: false}];
}

// Returns the name if the user confirms its deletion, otherwise null.
function confirmDeletion(name) {
  const question = navigator.language.startsWith("zh")
    ? `删除声音“${name}”？所有用户都将无法再使用它。`
    : `Delete the voice “${name}”? It will be gone for all users.`;
  return confirm(question) ? name : null;
}
