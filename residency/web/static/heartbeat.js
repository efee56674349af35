// Sends the page's heartbeat, on which the server keeps the files of its session. Gradio's own stream does not reconnect
// after a cut. The server replaces EVERY_MS. Reloads a page that the server does not know, for example from before a
// restart (410; 401 with a login, since logins do not survive a restart): saved_inputs.py restores its inputs.
(identity) => {
  const [session, secret, isRunning] = identity.split(".");
  const stay = () => {
    sessionStorage.setItem("visit", secret);  // for a reload
    sessionStorage.removeItem("left");
  };
  stay();
  window.addEventListener("pageshow", stay);  // restored from the back/forward cache
  window.addEventListener("pagehide", () => sessionStorage.setItem("left", secret));
  if (isRunning) document.querySelector("#follow-request").click();
  const beat = async () => {
    try {
      const answer = await fetch(`gradio_api/here/${session}`);
      // After a cut, Gradio 6 reloads the page by itself; Gradio 5 would wait for its stream without end.
      const cut = document.querySelector(".toast-wrap")?.textContent.includes("Connection to the server was lost");
      if (cut || [401, 410].includes(answer.status)) location.reload();
    } catch {}  // the next heartbeat may arrive
  };
  setInterval(beat, EVERY_MS);
  for (const event of ["online", "pageshow"]) window.addEventListener(event, beat);
  document.addEventListener("visibilitychange", beat);
  // A press may be the first contact with a restarted server.
  document.addEventListener("click", event => { if (event.target.closest("#clone, #edit, #clone-edit")) beat(); });
}
