// Tells the server now and then that this page is there: what its session has on the server's disk is kept as long.
// Gradio has a line for that, but does not take it up again once it was cut. The server puts EVERY_MS in. A page that the
// server does not know, such as one from before its start, is loaded anew: it keeps what is filled in (saved_inputs.py),
// and shows nothing any more that is gone. With a login the answer is 401, since a new server knows no login either.
(visit) => {
  const [session, secret, goesOn] = visit.split(".");
  const stay = () => {
    sessionStorage.setItem("visit", secret);  // for when this page is loaded anew
    sessionStorage.removeItem("left");
  };
  stay();
  window.addEventListener("pageshow", stay);  // as it was left, from the browser's memory
  window.addEventListener("pagehide", () => sessionStorage.setItem("left", secret));
  if (goesOn) document.querySelector("#hear-the-end").click();
  const tell = async () => {
    try {
      const answer = await fetch(`gradio_api/here/${session}`);
      // With Gradio 6 a page whose line was cut loads itself anew; with Gradio 5 it would wait on that line for ever.
      const cut = document.querySelector(".toast-wrap")?.textContent.includes("Connection to the server was lost");
      if (cut || [401, 410].includes(answer.status)) location.reload();
    } catch {}  // the next one may arrive
  };
  setInterval(tell, EVERY_MS);
  for (const event of ["online", "pageshow"]) window.addEventListener(event, tell);
  document.addEventListener("visibilitychange", tell);
  // A press may be the first that reaches a server which was started again.
  document.addEventListener("click", event => { if (event.target.closest("#clone, #edit")) tell(); });
}
