// Voices that are stored on the server for all users (ui/voices.py).

// Returns the name if the user confirms its deletion, otherwise null.
function confirmDeletion(name) {
  const question = navigator.language.startsWith("zh")
    ? `删除声音“${name}”？所有用户都将无法再使用它。`
    : `Delete the voice “${name}”? It will be gone for all users.`;
  return confirm(question) ? name : null;
}
