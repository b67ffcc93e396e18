/** One generation: from the request over the previews to its last image. */

import { ApiError, postForEvents } from "./api.js";
import { announce, reveal } from "./parts.js";
import { asStream } from "./request_form.js";

const QUARTERS = ["", "A quarter is done.", "Half is done.", "Three quarters are done."];

/** Fills the gallery; throws what the server or the signal ends it with. What came until then stays. */
export async function generate(request, model, gallery, signal) {
  const run = new Run(request, model, gallery);
  try {
    for await (const event of postForEvents("v1/images/generations", asStream(request), signal)) {
      run.take(event);
    }
    run.check();
  } finally {
    run.end();
  }
}

class Run {
  #waiting;
  #quarter = 0;

  constructor(request, model, gallery) {
    this.request = request;
    this.model = model;
    this.gallery = gallery;
    this.cards = gallery.expect(request);
    this.#waiting = new Set(this.cards);
    reveal(this.cards[0].root);
    announce(`Generating ${counted(request.n)}.`);
  }

  take(event) {
    const card = this.cards[event.image_index];
    if (!this.#waiting.has(card)) return;
    if (event.type === "image_generation.partial_image") this.#progress(card, event);
    if (event.type === "image_generation.completed") this.#complete(card, event);
  }

  check() {
    if (this.#waiting.size) throw new ApiError("The server stopped before all images were done", 0);
    announce(`${counted(this.request.n)} done.`);
  }

  end() {
    this.gallery.drop(this.#waiting);
  }

  #complete(card, { b64_json, output_format, seed, size }) {
    const blob = new Blob([bytesOf(b64_json)], { type: `image/${output_format}` });
    card.share = 1;
    this.#waiting.delete(card);
    this.gallery.finish(card, { blob, seed, size, request: this.request, model: this.model });
  }

  #progress(card, event) {
    card.show(event);
    this.#speak();
  }

  /** Each step would be too much to listen to. */
  #speak() {
    const done = this.cards.reduce((sum, { share }) => sum + share, 0) / this.cards.length;
    const quarter = Math.min(Math.floor(done * 4), 3);
    if (quarter > this.#quarter) announce(QUARTERS[quarter]);
    this.#quarter = Math.max(quarter, this.#quarter);
  }
}

const counted = (n) => (n === 1 ? "1 image" : `${n} images`);

const bytesOf = (base64) => Uint8Array.from(atob(base64), (char) => char.charCodeAt(0));
