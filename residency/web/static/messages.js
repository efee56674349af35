// Messages of requests, and what is in view when a request begins and ends (ui/messages.py).

// Links each error to its control for assistive technology.
function tie() {
  for (const place of document.querySelectorAll(".said[id^=about-]")) {
    const error = place.querySelector("[role=alert]");
    const id = place.id.slice("about-".length);
    for (const control of document.querySelectorAll(`#${id} :is(textarea, input:not([type=file]))`)) {
      control.toggleAttribute("aria-invalid", !!error);
      if (error) control.setAttribute("aria-describedby", place.id);
      else control.removeAttribute("aria-describedby");
    }
  }
}

const types = () => document.activeElement?.matches("textarea, input");

// A press of CLONE or EDIT: scrolls the progress line into view.
function begin() {
  const look = times => {
    const line = document.querySelector("#progress:has([data-running])");
    if (types()) return;
    if (line) line.scrollIntoView({block: "nearest"});
    else if (times) setTimeout(look, 100, times - 1);
  };
  setTimeout(look, 100, 50);
}

// The end of a press, after the history is drawn: scrolls an error into view. In a single column also the newest
// result, since the history grows above the buttons; not while the user types.
function show() {
  setTimeout(() => {
    tie();
    document.querySelector(".said [role=alert]")?.scrollIntoView({block: "nearest"});
    if (document.querySelector(".said [role]") || !matchMedia("(max-width: 640px)").matches) return;
    if (types() || document.querySelector("#progress [data-running]")) return;
    [...document.querySelectorAll("#history .bot-row")].at(-1)?.scrollIntoView({block: "nearest"});
  }, 100);
}

// Empties so many places.
function wipe(count) {
  setTimeout(tie, 100);
  return count === 1 ? "" : Array(count).fill("");
}

// Empties the place of a text that the user changes; not when a page reload restores the text. Otherwise no change,
// instead of the place's content, which may be replaced by the next message meanwhile.
function wipeByHand(control) {
  return document.activeElement?.closest(`#${control}`) ? wipe(1) : {__type__: "update"};
}
