/* Quizzes: every box of class `quiz`, a question with a task list of options and an explanation below each, can be answered in the page. Without
   this script the page shows the options, which of them are right, and why. Nothing is stored or sent. */
(() => {
  "use strict";
  const ICONS = { // a shape, a colour and a word: none of them alone
    right: '<svg viewBox="0 0 16 16" aria-hidden="true"><circle cx="8" cy="8" r="8"/><path d="M4.5 8.2l2.4 2.4 4.6-5"/></svg>',
    wrong: '<svg viewBox="0 0 16 16" aria-hidden="true"><rect width="16" height="16" rx="2"/><path d="M5 5l6 6M11 5l-6 6"/></svg>',
  };

  function element(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  }

  function verdict(kind, words) {
    const made = element("span", { class: "quiz-verdict" });
    made.innerHTML = ICONS[kind];
    made.append(`${words} `);
    return made;
  }

  /** Take apart the list that the page comes with. Nodes are moved, never copied, so that formulas work whether MathJax ran or not. */
  function optionsOf(list) {
    return [...list.children].map((item) => {
      const box = item.querySelector("input[type=checkbox]");
      const line = box.parentElement; // a paragraph, or the item itself in a tight list
      const right = box.hasAttribute("checked");
      const reasons = [...item.querySelectorAll(":scope > ul > li")].flatMap((li) => [...li.childNodes]);
      item.querySelector(":scope > ul")?.remove();
      box.remove();
      return { right, text: [...line.childNodes], reasons };
    });
  }

  /** Give a box a form; calls `answered(first)` once, at the first try. */
  function question(box, number, answered) {
    const list = box.querySelector(":scope > ul.contains-task-list");
    const options = optionsOf(list);
    const several = options.filter((o) => o.right).length > 1;
    const legend = element("legend");
    const fieldset = element("fieldset", {}, legend);
    const title = box.querySelector(":scope > .admonition-title");
    const [prompt, ...more] = [...box.children].filter((e) => e !== title && e !== list);
    legend.append(...prompt.childNodes); // of a legend only running text is allowed
    prompt.remove();
    fieldset.append(...more);
    if (several) legend.append(" ", element("em", {}, "Mark all that apply."));

    options.forEach((o, i) => {
      const id = `quiz-${number}-${i + 1}`;
      o.input = element("input", { type: several ? "checkbox" : "radio", name: `quiz-${number}`, id, autocomplete: "off" });
      const words = o.right ? "Right." : several ? "Does not apply." : "Not right.";
      const kind = o.right ? "right" : "wrong";
      o.feedback = element("div", { class: `quiz-feedback ${kind}`, hidden: "" });
      const [first, ...others] = o.reasons.filter((n) => n.nodeType === Node.ELEMENT_NODE || n.textContent.trim());
      const opening = first?.nodeName === "P" ? first : element("p", {}, ...(first ? [first] : []));
      opening.prepend(verdict(kind, words));
      o.feedback.append(opening, ...others);
      const row = element("div", { class: "quiz-option" }, o.input, element("label", { for: id }, ...o.text));
      row.classList.toggle("is-right", o.right);
      fieldset.append(row, element("div", { "aria-live": "polite" }, o.feedback));
    });
    list.remove();
    box.append(fieldset);
    box.classList.add("is-ready");

    let tried = false;
    function count(first) {
      if (tried) return;
      tried = true;
      answered(first);
    }

    let reset = () => {};
    if (several) {
      const summary = element("p", { class: "quiz-summary" });
      const button = element("button", { type: "button" }, "Check");
      fieldset.append(button, element("div", { "aria-live": "polite" }, summary));
      const hide = () => {
        summary.replaceChildren();
        options.forEach((o) => (o.feedback.hidden = true));
      };
      button.addEventListener("click", () => {
        const marked = options.filter((o) => o.input.checked);
        if (!marked.length) {
          summary.replaceChildren("Mark at least one option first.");
          return;
        }
        const missing = options.filter((o) => o.right && !o.input.checked).length;
        const excess = marked.filter((o) => !o.right).length;
        options.forEach((o) => (o.feedback.hidden = !o.input.checked));
        const faults = [missing && `${missing} more ${missing > 1 ? "apply" : "applies"}`, excess && `${excess} of yours ${excess > 1 ? "do" : "does"} not`].filter(Boolean);
        summary.replaceChildren(faults.length ? verdict("wrong", `Not yet: ${faults.join(", and ")}.`) : verdict("right", "Right: these and no others."));
        count(!faults.length);
      });
      options.forEach((o) => o.input.addEventListener("change", hide));
      reset = hide;
    } else {
      const show = (chosen) => options.forEach((o) => (o.feedback.hidden = o !== chosen));
      options.forEach((o, i) => {
        o.input.addEventListener("change", () => {
          show(o);
          count(o.right);
        });
        // Arrow keys would choose every option that they pass: they move the focus, and the space bar or Enter chooses.
        o.input.addEventListener("keydown", (event) => {
          const step = { ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1 }[event.key];
          if (step) {
            event.preventDefault();
            options.at((i + step) % options.length).input.focus();
          } else if (event.key === "Enter") {
            event.preventDefault();
            o.input.click();
          }
        });
        o.input.setAttribute("aria-describedby", "quiz-keys");
      });
      reset = () => show(null);
    }
    return {
      focus: () => options[0].input.focus(),
      reset() {
        tried = false;
        options.forEach((o) => (o.input.checked = false));
        reset();
      },
    };
  }

  function start() {
    const boxes = [...document.querySelectorAll(".admonition.quiz")];
    if (!boxes.length) return;
    let asked = 0, right = 0;
    const score = element("p", { role: "status" });
    const again = element("button", { type: "button" }, "Start again");
    const tell = () => {
      const left = boxes.length - asked;
      const rest = left ? `, ${left} to go.` : ".";
      score.textContent = asked ? `${right} of ${asked} at the first try${rest}` : `${boxes.length} questions, none answered yet.`;
      again.disabled = !asked;
    };
    const questions = boxes.map((box, i) =>
      question(box, i + 1, (first) => {
        asked += 1;
        right += first;
        tell();
      }),
    );
    again.addEventListener("click", () => {
      asked = right = 0;
      questions.forEach((q) => q.reset());
      tell();
      questions[0].focus();
    });
    boxes.at(-1).after(
      element("div", { class: "quiz-score" }, score, again),
      element("p", { id: "quiz-keys", hidden: "" }, "Arrow keys move, the space bar chooses."),
    );
    tell();
  }

  start();
})();
