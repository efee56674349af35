// Tells the server now and then that this page is there: what its session has on the server's disk is kept as long.
// Gradio has a line for that, but does not take it up again once it was cut. The server puts EVERY_MS in, and answers a
// page that it does not know, such as one from before its start, with what to say there.
(visit) => {
  const [session, secret, goesOn] = visit.split(".");
  const stay = () => {
    sessionStorage.setItem("visit", `${session}.${secret}`);  // for when this page is loaded anew
    sessionStorage.removeItem("left");
  };
  stay();
  window.addEventListener("pageshow", stay);  // as it was left, from the browser's memory
  window.addEventListener("pagehide", () => sessionStorage.setItem("left", `${session}.${secret}`));
  if (goesOn) document.querySelector("#hear-the-end").click();
  const tell = async () => {
    try {
      const answer = await fetch(`gradio_api/here/${session}`);
      // With Gradio 6 such a page loads itself anew; with Gradio 5 it would wait for ever on the line that was cut.
      if (document.querySelector(".toast-wrap")?.textContent.includes("Connection to the server was lost")) location.reload();
      else if (answer.status === 410) document.querySelector("#not-known p").textContent = await answer.text();
    } catch {}  // the next one may arrive
  };
  setInterval(tell, EVERY_MS);
  for (const event of ["online", "pageshow"]) window.addEventListener(event, tell);
  document.addEventListener("visibilitychange", tell);
}
