"use strict";
// Puts in what the server sends, section by section, and lets ages go on. The server has escaped it; no script runs in it.
(() => {
  const shown = {};
  let ahead = 0; // the server's clock less this one, in seconds

  const duration = (seconds) => {
    const units = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];
    const whole = Math.max(0, Math.round(seconds));
    const first = units.findIndex(([size]) => whole >= size);
    if (first < 0) return "0 s";
    const [size, name] = units[first];
    const next = units[first + 1];
    const rest = next ? Math.floor((whole % size) / next[0]) : 0;
    return `${Math.floor(whole / size)} ${name}` + (rest ? ` ${rest} ${next[1]}` : "");
  };
  const age = () => {
    const now = Date.now() / 1000 + ahead;
    for (const time of document.querySelectorAll("time[data-at]")) {
      const text = duration(now - time.dataset.at);
      const said = { ago: `${text} ago`, for: `for ${text}` }[time.dataset.way] ?? text;
      if (time.textContent !== said) time.textContent = said;
    }
  };

  const source = new EventSource("/events");
  const lost = document.getElementById("lost");
  source.onmessage = (message) => {
    const told = JSON.parse(message.data);
    ahead = told.now - Date.now() / 1000;
    lost.hidden = true;
    for (const [id, html] of Object.entries(told.parts)) {
      if (shown[id] === html) continue;
      shown[id] = html;
      document.getElementById(id).innerHTML = html;
    }
    document.title = told.title;
    age();
  };
  source.onerror = () => { lost.hidden = false; };
  setInterval(age, 1000);
})();
