// Gradio's form for the password says nothing when the server answers that it was tried too often: this says it.
const plainFetch = window.fetch;
window.fetch = async (...request) => {
  const answer = await plainFetch(...request);
  const url = new URL(request[0]?.url ?? request[0], location.href);
  if (url.pathname.endsWith("/login")) {
    document.querySelector("#too-often")?.remove();
    // What was said of the password before: it was not looked at this time.
    document.querySelector(".creds")?.style.setProperty("display", answer.status === 429 ? "none" : "");
    if (answer.status === 429) {
      const line = document.createElement("p");
      line.id = "too-often";
      line.setAttribute("role", "alert");
      line.style = "color: var(--error-text-color); font-weight: 500";
      line.textContent = `⚠️ ${await answer.clone().text()}`;
      (document.querySelector("h2") ?? document.body.firstElementChild).after(line);
    }
  }
  return answer;
};
