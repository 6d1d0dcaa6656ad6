/* Aids for every page; without them it is all there as well. */
(() => {
  "use strict";
  const article = document.querySelector(".bd-article");
  if (!article) return;

  /* For assistive technology, what theme, docutils and pandas leave out: a landmark, roles of today, corners of tables that head
     nothing, formulas that scroll */
  const bar = document.querySelector(".bd-sidebar-primary");
  bar?.setAttribute("role", "complementary");
  bar?.setAttribute("aria-label", "Book");
  for (const entry of article.querySelectorAll("[role=doc-biblioentry]")) entry.setAttribute("role", "listitem");
  for (const cell of article.querySelectorAll("th")) if (!cell.textContent.trim()) cell.setAttribute("role", "cell");
  const scrolls = new ResizeObserver((entries) => {
    for (const { target } of entries) {
      if (target.scrollWidth > target.clientWidth) target.tabIndex = 0;
      else target.removeAttribute("tabindex");
    }
  });
  const watch = () => article.querySelectorAll("div.math, mjx-container[display]").forEach((e) => scrolls.observe(e));
  addEventListener("load", () => (window.MathJax?.startup?.promise ?? Promise.resolve()).then(watch));

  /* Solutions: all at once. What is open is printed, what is closed is not. */
  const heading = article.querySelector("#exercises > h2");
  const solutions = [...article.querySelectorAll(".solution.dropdown")];
  if (heading && solutions.length) {
    const button = Object.assign(document.createElement("button"), { type: "button", className: "solutions", textContent: "Open all solutions" });
    button.addEventListener("click", () => {
      const closed = (box) => box.classList.contains("toggle-hidden");
      const open = solutions.some(closed);
      for (const box of solutions) if (closed(box) === open) box.querySelector(".toggle-button")?.click();
      button.textContent = open ? "Close all solutions" : "Open all solutions";
    });
    heading.after(button);
  }

  /* What a reference points to, beside the reference: on hover and focus, on a touch screen at the first tap. Esc closes it. */
  const box = Object.assign(document.createElement("div"), { id: "preview", popover: "manual" });
  if (!box.showPopover) return;
  article.append(box);
  const pages = new Map([[location.pathname, Promise.resolve(document)]]);
  let wanted = null, shown = null, timer = 0, touched = false;

  /** Text of a citation, or a copy of the figure, table, formula, theorem, exercise or entry of the glossary. */
  async function target(link) {
    if (link.dataset.cited) return link.dataset.cited;
    const url = new URL(link.href);
    if (!pages.has(url.pathname)) {
      const read = fetch(url.pathname).then((answer) => answer.text());
      pages.set(url.pathname, read.then((text) => new DOMParser().parseFromString(text, "text/html")));
    }
    let found = (await pages.get(url.pathname)).getElementById(decodeURIComponent(url.hash.slice(1)));
    if (found?.matches("dt")) found = found.nextElementSibling;
    if (!found?.matches("figure, table, dd, div.math, div.proof, div.exercise")) return null;
    const copy = found.cloneNode(true);
    for (const e of [copy, ...copy.querySelectorAll("[id]")]) e.removeAttribute("id");
    for (const e of copy.querySelectorAll(".headerlink, button")) e.remove();
    for (const e of copy.querySelectorAll("img")) e.src = new URL(e.getAttribute("src"), url);
    return copy;
  }

  async function show(link) {
    clearTimeout(timer);
    if (shown === link) return true;
    hide();
    wanted = link;
    const content = await target(link).catch(() => null);
    if (!content || wanted !== link) return Boolean(content);
    box.replaceChildren(content);
    if (touched) box.append(Object.assign(document.createElement("a"), { href: link.href, textContent: "Go there" }));
    box.showPopover();
    await window.MathJax?.typesetPromise?.([box]);
    const at = link.getClientRects()[0], room = innerHeight - at.bottom;
    box.style.left = `${Math.max(8, Math.min(at.left, innerWidth - box.offsetWidth - 8))}px`;
    box.style.top = `${room > box.offsetHeight + 8 || room > at.top ? at.bottom + 2 : Math.max(8, at.top - box.offsetHeight - 2)}px`;
    link.setAttribute("aria-describedby", "preview");
    shown = link;
    return true;
  }

  function hide() {
    clearTimeout(timer);
    shown?.removeAttribute("aria-describedby");
    wanted = shown = null;
    box.hidePopover();
  }

  const soon = (action, wait) => {
    clearTimeout(timer);
    timer = setTimeout(action, wait);
  };
  for (const link of article.querySelectorAll('a.reference.internal[href*="#"]')) {
    if (link.title) [link.dataset.cited, link.title] = [link.title, ""];
    link.addEventListener("pointerenter", (e) => e.pointerType === "mouse" && soon(() => show(link), 200));
    link.addEventListener("pointerleave", (e) => e.pointerType === "mouse" && soon(hide, 300));
    link.addEventListener("focus", () => link.matches(":focus-visible") && !touched && show(link));
    link.addEventListener("blur", () => soon(hide, 300));
    link.addEventListener("click", async (e) => {
      if (!touched || shown === link) return;
      e.preventDefault();
      if (!(await show(link))) location.assign(link.href);
    });
  }
  box.addEventListener("pointerenter", () => clearTimeout(timer));
  box.addEventListener("pointerleave", () => !touched && soon(hide, 300));
  addEventListener("keydown", (e) => {
    touched = false;
    if (e.key === "Escape") hide();
  }, true);
  addEventListener("pointerdown", (e) => {
    touched = e.pointerType === "touch";
    if (!box.contains(e.target) && e.target.closest?.("a") !== shown) hide();
  }, true);
})();
