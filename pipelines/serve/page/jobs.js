/** Upscaling jobs of this key: asked for at the start, then each second while one of them is on its way. */

import { getJson, postJson, jobPath, told } from "./api.js";
import { JobCard, isActive } from "./job_card.js";
import { announce, byId, reveal, setText } from "./parts.js";

const POLL_MS = 1000;
const MAX_POLL_MS = 15_000;

export class Jobs {
  #cards = new Map();
  #list = byId("jobs");
  #timer = null;
  #failures = 0;
  #open;

  /** open: (title, path of the tiles) → shows a finished job. */
  constructor(open) {
    this.#open = open;
  }

  /** Ask for all jobs, and keep asking while that is worth it; throws nothing. */
  async refresh() {
    clearTimeout(this.#timer);
    try {
      const { data } = await getJson("v1/jobs");
      this.#failures = 0;
      this.#tell("");
      this.#show(data);
    } catch (error) {
      this.#failures = mayPass(error) ? this.#failures + 1 : 0;
      this.#tell(told(error));
    }
    this.#schedule();
  }

  /** A job that was just started. */
  add(job) {
    this.#update(job);
    reveal(this.#cards.get(job.id).root);
    announce(`Upscaling of seed ${job.seed} has started.`);
    this.#schedule();
  }

  /** Newest first, so a card that is new goes before all others; cards that stay are not moved. */
  #show(jobs) {
    jobs.toReversed().forEach((job) => this.#update(job, true));
    const known = new Set(jobs.map(({ id }) => id));
    for (const [id, card] of this.#cards) {
      // One that was never listed was started after the list was made.
      if (card.isListed && !known.has(id)) this.#remove(id);
    }
    this.#showSection();
  }

  #update(job, isListed = false) {
    const card = this.#cards.get(job.id) ?? this.#insert(job.id);
    card.isListed ||= isListed;
    card.update(job);
  }

  #insert(id) {
    const card = new JobCard({ open: this.#open, cancel: () => this.#cancel(id) });
    this.#cards.set(id, card);
    this.#list.prepend(card.root);
    this.#showSection();
    return card;
  }

  #remove(id) {
    this.#cards.get(id).close();
    this.#cards.delete(id);
  }

  async #cancel(id) {
    try {
      this.#update(await postJson(jobPath(id, "/cancel")));
    } catch (error) {
      this.#tell(told(error));
    }
  }

  #schedule() {
    clearTimeout(this.#timer);
    const isBusy = [...this.#cards.values()].some(({ job }) => isActive(job));
    if (!isBusy && !this.#failures) return;
    const wait = Math.min(POLL_MS * 2 ** this.#failures, MAX_POLL_MS);
    this.#timer = setTimeout(() => this.refresh(), wait);
  }

  #tell(text) {
    setText(byId("jobs-alert"), text);
    this.#showSection();
  }

  #showSection() {
    byId("jobs-section").hidden = this.#cards.size === 0 && byId("jobs-alert").textContent === "";
  }
}

/** No answer, too many requests, or trouble of the server's own: worth another try. */
const mayPass = ({ status }) => status === 0 || status === 429 || status >= 500;
