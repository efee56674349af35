// Shows the rate limit (429) in Gradio's login form, which ignores it.
const plainFetch = window.fetch;
window.fetch = async (...request) => {
  const answer = await plainFetch(...request);
  const url = new URL(request[0]?.url ?? request[0], location.href);
  if (url.pathname.endsWith("/login")) {
    document.querySelector("#too-often")?.remove();
    // Hides the message about an earlier password: this one was not checked.
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
