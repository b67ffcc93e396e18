/** One upscaling job: how far it is, what it looks like by now, and what can be done with it. */

import { getBlob, jobPath, key, told, urlOf } from "./api.js";
import { announce, copyOf, setText } from "./parts.js";
import { shown } from "./sizes.js";

const ENDS = { completed: "Done", failed: "Failed", cancelled: "Cancelled" };

export const isActive = ({ status }) => !(status in ENDS);

export class JobCard {
  job = null;
  isListed = false;
  #previewOf = "";

  /** actions: `open(title, path)` of the tiles, `cancel()`. */
  constructor(actions) {
    this.parts = copyOf("job-card");
    this.root = this.parts.root;
    const { open, cancel, download } = this.parts;
    open.addEventListener("click", () => actions.open(this.#name, jobPath(this.job.id, "/tiles.dzi")));
    cancel.addEventListener("click", () => actions.cancel());
    download.addEventListener("click", (event) => this.#download(event));
  }

  update(job) {
    const before = this.job;
    this.job = job;
    this.root.dataset.status = job.status;
    this.parts.title.textContent = this.#name;
    this.parts.stage.textContent = stageOf(job);
    if (job.error) setText(this.parts.alert, job.error.message);
    this.#showProgress();
    this.#showActions();
    this.#showPreview();
    if (before && isActive(before) && !isActive(job)) announce(`${this.#name}: ${stageOf(job)}`);
  }

  close() {
    this.root.remove();
    URL.revokeObjectURL(this.parts.preview.src);
  }

  get #name() {
    const { seed, size } = this.job;
    return size ? `Seed ${seed}, ${shown(size)}` : `Seed ${seed}`;
  }

  #showProgress() {
    const { progress, status } = this.job;
    this.parts.progress.hidden = !isActive(this.job);
    this.parts.progress.setAttribute("aria-label", `Progress of seed ${this.job.seed}`);
    if (status === "queued") this.parts.progress.removeAttribute("value");
    else this.parts.progress.value = progress;
  }

  #showActions() {
    const focused = document.activeElement;
    const isDone = this.job.status === "completed";
    this.parts.open.hidden = this.parts.download.hidden = !isDone;
    this.parts.cancel.hidden = !isActive(this.job);
    this.parts.download.href = urlOf(jobPath(this.job.id, "/content"));
    // Focus must not get lost with the button that had it.
    if (this.root.contains(focused) && focused.hidden) (isDone ? this.parts.open : this.root).focus();
  }

  /** Asked for again only where there is something new to see. */
  async #showPreview() {
    const { id, has_preview, progress, status } = this.job;
    const state = `${status} ${progress}`;
    if (!has_preview || state === this.#previewOf) return;
    this.#previewOf = state;
    try {
      const blob = await getBlob(jobPath(id, "/preview"));
      URL.revokeObjectURL(this.parts.preview.src);
      Object.assign(this.parts.preview, { src: URL.createObjectURL(blob), hidden: false });
    } catch {
      // The card does without; a server that is gone is told where the jobs are asked for.
      this.#previewOf = "";
    }
  }

  /** A link cannot carry a key; without one it is left to the browser, which writes straight to disk. */
  async #download(event) {
    if (!key()) return;
    event.preventDefault();
    this.parts.download.textContent = "Downloading…";
    try {
      save(await getBlob(jobPath(this.job.id, "/content")), this.job.seed);
    } catch (error) {
      setText(this.parts.alert, told(error));
    }
    this.parts.download.textContent = "Download";
  }
}

function stageOf({ status, stage, progress, expires_at }) {
  if (status === "queued") return "Waiting";
  if (status === "running") return `${capitalised(stage ?? "running")}, ${Math.floor(progress * 100)} %`;
  return expires_at && status === "completed" ? `Done, kept until ${timeOf(expires_at)}` : ENDS[status];
}

const capitalised = (text) => text.charAt(0).toUpperCase() + text.slice(1);

const timeOf = (unixS) =>
  new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "short" }).format(unixS * 1000);

function save(blob, seed) {
  const href = URL.createObjectURL(blob);
  const extension = blob.type.replace(/^image\//, "").replace(/\W.*/, "");
  Object.assign(document.createElement("a"), { href, download: `${seed}.${extension}` }).click();
  // The download has begun by then; it holds the bytes itself.
  setTimeout(() => URL.revokeObjectURL(href), 60_000);
}
