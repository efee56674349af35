// Compares the page's address in the browser with the server's own address (`gradio_config.root`). If they differ,
// Gradio sends events to an unreachable address: a line at the top then shows which setting is missing.
addEventListener("DOMContentLoaded", () => {
  const root = new URL(window.gradio_config?.root || "./", location.href);
  const path = url => url.pathname.replace(/\/+$/, "");
  // The server serves both "/" and its root path.
  if (root.host === location.host && ["", path(root)].includes(path(location))) return;
  const line = document.createElement("p");
  line.id = "wrong-address";
  line.setAttribute("role", "alert");
  line.style = "margin: 0; padding: 12px 16px; background: #b91c1c; color: white; font: 15px/1.5 system-ui, sans-serif";
  const ours = location.origin + path(location), chinese = /^zh/i.test(navigator.languages.find(each => /^(zh|en)\b/i.test(each)));
  line.textContent = chinese
    ? `⚠️ 本页面的地址是 ${ours}，而服务器认为是 ${root.href}，因此按钮和上传无法使用。请让反向代理传递地址（nginx：proxy_set_header Host $http_host; 以及 proxy_set_header X-Forwarded-Proto $scheme;），或在启动时加上 --root-path ${ours}；如果已设置，请改用 ${root.href} 打开。`
    : `⚠️ This page was opened at ${ours}, but the server takes ${root.href} for its address, so buttons and uploads cannot work. Have the reverse proxy pass the address on (nginx: proxy_set_header Host $http_host; and proxy_set_header X-Forwarded-Proto $scheme;), or start the app with --root-path ${ours}; if that was set, open ${root.href} instead.`;
  document.body.prepend(line);
});
