"use strict";
// The grid of clips: filters, and frames that play. Everything from the data becomes text nodes and
// attributes, never markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const grid = byId("grid"), more = byId("more"), counted = byId("counted"), nothing = byId("nothing");
  const ofClass = byId("of-class"), ofSplit = byId("of-split"), text = byId("text");
  const calm = window.matchMedia("(prefers-reduced-motion: reduce)");
  const STEP = 24, MILLISECONDS_A_FRAME = 170;
  let limit = STEP;

  const element = (tag, className, content) => {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (content !== undefined) made.textContent = content;
    return made;
  };

  const picture = (clip) => {
    const frame = element("span", "frame");
    if (clip.problem) {
      frame.classList.add("bad");
      frame.textContent = "This clip " + clip.problem;
      return { frame };
    }
    const image = element("img", clip.size[0] * 3 >= clip.size[1] * 4 ? "wide" : "tall");
    image.alt = "Frames of a clip of " + (clip.label || "no class") + ", split " + clip.split;
    image.decoding = "async";
    image.style.aspectRatio = clip.size[0] + " / " + clip.size[1];
    image.src = clip.sprite;
    const time = element("span", "time");
    frame.append(image, time);
    return { frame, image, time };
  };

  // Shows frame i of the sprite: the picture covers the box in height, so its position in per cent
  // chooses the frame. At rest the middle one is shown.
  const player = (button, clip, image, time) => {
    const last = clip.frames - 1;
    let timer = null, at = 0;
    const show = (index) => {
      image.style.objectPosition = (last ? (100 * index) / last : 0) + "% 0";
      button.dataset.frame = index;
    };
    const rest = () => { show(Math.floor(clip.frames / 2)); time.style.width = "0"; };
    const step = () => {
      show(at);
      time.style.width = (100 * (at + 1)) / clip.frames + "%";
      at = (at + 1) % clip.frames;
    };
    const start = () => { if (timer === null) { at = 0; step(); timer = setInterval(step, MILLISECONDS_A_FRAME); } };
    const stop = () => { clearInterval(timer); timer = null; rest(); };
    rest();
    return { start, stop };
  };

  const card = (clip) => {
    const item = element("li"), button = element("button", "clip");
    button.type = "button";
    button.title = clip.label + "\n" + clip.key + "\n" + clip.more;
    const { frame, image, time } = picture(clip);
    const facts = element("span", "facts");
    const label = element("span", "label", clip.label || "no class");
    label.dir = "auto";
    const key = element("span", "key", clip.key);
    const row = element("span", "row");
    row.append(element("span", "", clip.split), element("span", "", clip.facts));
    facts.append(label, key, row);
    button.append(frame, facts);
    if (image) {
      const { start, stop } = player(button, clip, image, time);
      const pinned = () => button.getAttribute("aria-pressed") === "true";
      button.setAttribute("aria-pressed", "false");
      button.addEventListener("click", () => {
        button.setAttribute("aria-pressed", String(!pinned()));
        if (pinned()) start(); else stop();
      });
      button.addEventListener("mouseenter", () => { if (!calm.matches) start(); });
      button.addEventListener("mouseleave", () => { if (!pinned()) stop(); });
    }
    item.append(button);
    return item;
  };

  const matching = () => {
    const wanted = text.value.trim().toLowerCase();
    return data.clips.filter((clip) =>
      (ofClass.value === "" || String(clip.labelIndex) === ofClass.value) &&
      (ofSplit.value === "" || clip.split === ofSplit.value) &&
      (wanted === "" || clip.words.includes(wanted)));
  };

  const cards = new Map();  // made when they are first shown
  const draw = () => {
    const found = matching(), shown = found.slice(0, limit);
    grid.replaceChildren(...shown.map((clip) => {
      if (!cards.has(clip)) cards.set(clip, card(clip));
      return cards.get(clip);
    }));
    nothing.hidden = found.length > 0;
    more.hidden = shown.length === found.length;
    more.textContent = "Show " + Math.min(STEP * 2, found.length - shown.length) + " more of " + (found.length - shown.length);
    counted.textContent = found.length === data.clips.length
      ? data.clips.length + " sampled clips" : found.length + " of " + data.clips.length + " sampled clips";
  };

  const fill = (select, options) => {
    for (const [value, label] of options) {
      const option = element("option", "", label);
      option.value = value;
      select.append(option);
    }
  };

  fill(ofClass, data.classes);
  fill(ofSplit, data.splits);
  for (const control of [ofClass, ofSplit, text]) {
    control.addEventListener("input", () => { limit = STEP; draw(); });
  }
  byId("clear").addEventListener("click", () => {
    ofClass.value = ofSplit.value = text.value = "";
    limit = STEP;
    draw();
  });
  more.addEventListener("click", () => {
    const before = grid.children.length;
    limit += STEP * 2;
    draw();
    grid.children[before].firstChild.focus();
  });
  for (const button of document.querySelectorAll("button[data-class]")) {
    button.addEventListener("click", () => {
      ofClass.value = button.dataset.class;
      ofSplit.value = text.value = "";
      limit = STEP;
      draw();
      byId("clips").scrollIntoView({ behavior: calm.matches ? "auto" : "smooth" });
      ofClass.focus({ preventScroll: true });
    });
  }
  byId("controls").hidden = false;
  draw();
})();
