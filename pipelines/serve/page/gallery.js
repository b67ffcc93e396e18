/** The images of this visit, newest first: cards that wait for an image, and cards that show one. */

import { postJson, told } from "./api.js";
import { byId, copyOf, setOptions } from "./parts.js";
import { shown, sides } from "./sizes.js";

/** Images are held in memory; beyond this many the oldest goes. */
const MAX_CARDS = 200;

let numCards = 0;

export class Gallery {
  #list = byId("gallery");
  #actions;

  /** actions: `reuse(request)`, `view(title, url)`, `jobStarted(job)`. */
  constructor(actions) {
    this.#actions = actions;
  }

  /** Cards at the front for the images of a request. */
  expect(request) {
    const cards = Array.from({ length: request.n }, () => new PendingCard(request.size));
    this.#list.prepend(...cards.map(({ root }) => root));
    this.#showEmpty();
    return cards;
  }

  /** Put a finished image in the place of a card that waited for it. */
  finish(pending, image) {
    pending.root.replaceWith(imageCard(image, this.#actions));
    const cards = [...this.#list.children];
    cards.slice(MAX_CARDS).forEach(forget);
  }

  /** Take away the cards that still wait. */
  drop(cards) {
    cards.forEach(({ root }) => root.remove());
    this.#showEmpty();
  }

  #showEmpty() {
    byId("empty").hidden = this.#list.childElementCount > 0;
  }
}

/** An image on its way: its preview, and how far it is. */
class PendingCard {
  constructor(size) {
    this.parts = copyOf("pending-card");
    this.root = this.parts.root;
    this.share = 0;
    setShape(this.parts.picture, size);
    this.parts.progress.setAttribute("aria-label", "Progress of the image");
  }

  /** step of num_steps is done, and looks like this PNG. */
  show({ b64_json, step, num_steps }) {
    this.share = step / num_steps;
    this.parts.step.textContent = `Step ${step} of ${num_steps}`;
    Object.assign(this.parts.progress, { max: num_steps, value: step });
    Object.assign(this.parts.image, { src: `data:image/png;base64,${b64_json}`, hidden: false });
  }
}

/** image: `{ blob, seed, size, request, model }`. */
function imageCard(image, actions) {
  const card = copyOf("image-card");
  const url = URL.createObjectURL(image.blob);
  const subject = subjectOf(image);
  setShape(card.view, image.size);
  Object.assign(card.image, { src: url, alt: subject || `Image of seed ${image.seed}` });
  card.view.addEventListener("click", () => actions.view(`Seed ${image.seed}, ${shown(image.size)}`, url));
  card.subject.textContent = subject;
  card.subject.hidden = !subject;
  card.settings.textContent = settingsOf(image);
  card.seed.textContent = `Seed ${image.seed}`;
  card.reuse.addEventListener("click", () => actions.reuse(alone(image)));
  const extension = image.blob.type.replace("image/", "");
  Object.assign(card.download, { href: url, download: `${image.seed}.${extension}` });
  card.download.setAttribute("aria-label", `Download the image of seed ${image.seed}`);
  offerUpscale(card, image, actions);
  return card.root;
}

/** The request that makes this image and no other. */
const alone = ({ request, seed }) => ({ ...request, n: 1, seed });

function subjectOf({ request, model }) {
  if (request.class_label !== undefined) return model.classes[request.class_label];
  return request.prompt ?? "";
}

function settingsOf({ request, size }) {
  const { num_inference_steps, guidance_scale, scheduler } = request;
  return `${shown(size)}, ${num_inference_steps} steps, guidance ${guidance_scale}, ${scheduler}`;
}

function offerUpscale(card, image, actions) {
  const longer = Math.max(...sides(image.size));
  const sizes = image.model.upscale_sizes_px.filter((px) => px > longer);
  card.upscale.hidden = sizes.length === 0;
  setOptions(card.upscaleSize, sizes.map((px) => [px, `${px} px`]));
  card.upscaleSize.id = `upscale-${++numCards}`;
  card.upscaleLabel.htmlFor = card.upscaleSize.id;
  card.upscale.addEventListener("submit", (event) => {
    event.preventDefault();
    startUpscale(card, image, actions);
  });
}

async function startUpscale(card, image, actions) {
  card.alert.textContent = "";
  try {
    const upscale_to = Number(card.upscaleSize.value);
    actions.jobStarted(await postJson("v1/jobs", { ...alone(image), upscale_to }));
  } catch (error) {
    card.alert.textContent = told(error);
  }
}

/** The room that an image will take, before it is there. */
function setShape(element, size) {
  element.style.aspectRatio = sides(size).join(" / ");
}

function forget(card) {
  URL.revokeObjectURL(card.querySelector("img").src);
  card.remove();
}
