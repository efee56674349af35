// Tells the server now and then that this page is there: what its session has on the server's disk is kept as long.
// Gradio has a line for that, but does not take it up again once it was cut. The server puts EVERY_MS in.
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
  const tell = () => fetch(`gradio_api/here/${session}`).catch(() => {});  // the next one may arrive
  setInterval(tell, EVERY_MS);
  for (const event of ["online", "pageshow"]) window.addEventListener(event, tell);
  document.addEventListener("visibilitychange", tell);
}
