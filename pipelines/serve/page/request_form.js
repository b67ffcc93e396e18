/** The form: a model's limits become attributes of the fields, and the fields become a request. */

import { byId, setOptions } from "./parts.js";
import { shown, suggestedSizes } from "./sizes.js";

/** The most previews of an image that the server sends. */
const MAX_PREVIEWS = 50;

export class RequestForm {
  #models = new Map();

  constructor() {
    this.element = byId("form");
    this.fields = this.element.elements;
    this.fields.model.addEventListener("change", () => this.#showModel());
    byId("dice").addEventListener("click", () => this.#drawSeed());
  }

  get model() {
    return this.#models.get(this.fields.model.value);
  }

  get isReady() {
    return this.#models.size > 0;
  }

  setModels(models) {
    this.#models = new Map(models.map((model) => [model.id, model]));
    setOptions(this.fields.model, models.map(({ id }) => [id, id]));
    byId("fields").disabled = !this.isReady;
    if (this.isReady) this.#showModel();
  }

  /** The body of a request, without what the model does not take. */
  read() {
    const { fields, model } = this;
    const request = {
      model: model.id,
      n: fields.n.valueAsNumber,
      size: fields.size.value,
      num_inference_steps: fields.num_inference_steps.valueAsNumber,
      guidance_scale: fields.guidance_scale.valueAsNumber,
      scheduler: fields.scheduler.value,
    };
    if (fields.seed.value) request.seed = fields.seed.value;
    if (model.takes_prompt) {
      Object.assign(request, { prompt: fields.prompt.value, negative_prompt: fields.negative_prompt.value });
    }
    if (model.classes && fields.class_label.value) request.class_label = Number(fields.class_label.value);
    return request;
  }

  /** Put a request's settings back; a model that is gone leaves the one that is shown. */
  fill(request) {
    if (this.#models.has(request.model)) this.fields.model.value = request.model;
    this.#showModel();
    for (const [name, value] of Object.entries({ class_label: "", ...request })) {
      if (name !== "model") this.#set(this.fields[name], value);
    }
  }

  /** A size that is not among the suggestions is added to them. */
  #set(field, value) {
    field.value = value;
    if (field === this.fields.size && field.value !== value) {
      field.append(new Option(shown(value), value, true, true));
    }
  }

  #showModel() {
    const { fields, model } = this;
    byId("prompt-field").hidden = byId("negative-field").hidden = !model.takes_prompt;
    byId("class-field").hidden = !model.classes;
    const classes = (model.classes ?? []).map((name, label) => [label, name]);
    setOptions(fields.class_label, [["", "No class"], ...classes]);
    setOptions(fields.scheduler, model.schedulers.map((name) => [name, name]));
    fields.scheduler.value = model.default_scheduler;
    showSizes(fields.size, model);
    limit(fields.n, model.max_images, Math.min(fields.n.valueAsNumber || 1, model.max_images));
    limit(fields.num_inference_steps, model.max_steps, model.default_steps);
    limit(fields.guidance_scale, model.max_guidance, model.default_guidance);
  }

  /** 32 bits: short enough to be told to someone. */
  #drawSeed() {
    this.fields.seed.value = crypto.getRandomValues(new Uint32Array(1))[0];
  }
}

/** A request as one that is streamed, with as many previews as there are steps. */
export const asStream = (request) => ({
  ...request,
  stream: true,
  partial_images: Math.min(request.num_inference_steps, MAX_PREVIEWS),
});

function limit(field, max, value) {
  Object.assign(field, { max, value });
}

function showSizes(select, model) {
  const groups = Object.entries(suggestedSizes(model)).filter(([, sizes]) => sizes.length);
  select.replaceChildren(...groups.map(([label, sizes]) => sizeGroup(label, sizes)));
  select.value = model.default_size;
}

function sizeGroup(label, sizes) {
  const group = Object.assign(document.createElement("optgroup"), { label });
  group.append(...sizes.map((size) => new Option(shown(size), size)));
  return group;
}
