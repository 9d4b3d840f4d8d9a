// The stepper's controls. A press is one message with all that the boxes say. Had each box messages of its own, as those
// of ipywidgets have, a press could overtake them while the kernel is busy: what was there before would be added.

const FORM = `
  <form class="nanovllm nanovllm-form">
    <div class="nanovllm-controls">
      <label class="nanovllm-prompt">Prompt <input name="prompt" value="The sun rises in the"></label>
      <label title="How many tokens the answer may have">
        Length <input name="max_tokens" type="number" required min="1" max="1000000">
      </label>
      <button value="add" title="Queue the prompt in the text box (enter)">Add a request</button>
    </div>
    <div class="nanovllm-controls">
      <button type="button" value="step" title="Make one step of the engine">Step</button>
      <button type="button" value="ten" title="Make ten steps">Step ×10</button>
      <button type="button" value="run" title="Make steps until every request is finished">Run</button>
      <label>Request <select name="request"></select></label>
      <button type="button" value="abort" title="End this request now">Abort</button>
      <button type="button" value="reset" title="Abort all, empty the prefix cache, begin anew">Reset</button>
    </div>
    <div class="nanovllm-message" role="status" aria-live="polite"></div>
  </form>`;

export default {
  render({ model, el }) {
    el.innerHTML = FORM;
    const form = el.querySelector("form");
    const { prompt, max_tokens, request } = form.elements;
    max_tokens.value = model.get("max_tokens");

    const press = (button) =>
      model.send({ button, prompt: prompt.value, max_tokens: max_tokens.valueAsNumber, request: request.value });
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      press("add");
    });
    for (const button of form.querySelectorAll("button[type=button]")) {
      button.addEventListener("click", () => press(button.value));
    }
    form.addEventListener("keydown", (event) => {
      if (!event.ctrlKey && !event.metaKey) event.stopPropagation(); // as `keepKeys` in widget.js, which says why
    });

    const show = () => {
      const names = model.get("unfinished");
      const chosen = names.includes(request.value) ? request.value : names[0];
      request.replaceChildren(...names.map((name) => new Option(name, name, false, name === chosen)));
      request.disabled = form.querySelector("[value=abort]").disabled = !names.length;
      form.querySelector("[role=status]").textContent = model.get("message");
    };
    show();
    model.on("change:unfinished change:message", show);
    return () => model.off("change:unfinished change:message", show);
  },
};
