/** The page: joins the form, the gallery, the jobs and the viewer. */

import { getJson, key, told, urlOf } from "./api.js";
import { Gallery } from "./gallery.js";
import { Jobs } from "./jobs.js";
import { askKey, connectKeyDialog } from "./key_dialog.js";
import { announce, byId, reveal } from "./parts.js";
import { RequestForm } from "./request_form.js";
import { generate } from "./run.js";
import { connectViewer, view } from "./viewer.js";

const RETRY_S = 5;

const form = new RequestForm();
const jobs = new Jobs((title, path) => view(title, urlOf(path)));
const gallery = new Gallery({
  reuse,
  view: (title, url) => view(title, { type: "image", url }),
  jobStarted: (job) => jobs.add(job),
});
/** The AbortController of the generation on its way. */
let running = null;

/** Models, then jobs; a server that is not up yet is asked again. */
async function start() {
  tell("");
  try {
    form.setModels((await getJson("v1/models")).data);
  } catch (error) {
    return startLater(error);
  }
  showRunning();
  jobs.refresh();
}

async function startLater(error) {
  if (error.status === 401) return enter();
  tell(told(error));
  if (error.status === 503 || error.status === 0) setTimeout(start, 1000 * (error.retryAfterS ?? RETRY_S));
}

/** After a 401: ask for the key, and begin again with it. */
async function enter() {
  if (await askKey(key() ? "The server does not know this key." : "")) return start();
  tell("The server asks for an API key.");
}

async function changeKey() {
  if (await askKey()) start();
}

async function submit() {
  if (running || !form.isReady) return;
  running = new AbortController();
  tell("");
  showRunning();
  try {
    await generate(form.read(), form.model, gallery, running.signal);
  } catch (error) {
    fail(error);
  }
  running = null;
  showRunning();
}

function fail(error) {
  if (error.name === "AbortError") return announce("Cancelled.");
  tell(told(error));
  if (error.status === 401) enter();
}

/** Focus stays with the button that can be used next. */
function showRunning() {
  const [generateButton, cancelButton] = [byId("generate"), byId("cancel")];
  const active = document.activeElement;
  generateButton.disabled = running !== null || !form.isReady;
  cancelButton.disabled = running === null;
  if (active === generateButton && running) cancelButton.focus();
  if (active === cancelButton && !running) generateButton.focus();
}

function reuse(request) {
  form.fill(request);
  reveal(form.element);
  byId("seed").focus();
  announce(`The settings of seed ${request.seed} are in the form.`);
}

function tell(text) {
  byId("alert").textContent = text;
}

function onKey(event) {
  if (document.querySelector("dialog[open]")) return;
  if (event.key === "Escape") running?.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    if (!running) form.element.requestSubmit();
  }
}

connectViewer();
connectKeyDialog();
document.addEventListener("keydown", onKey);
form.element.addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
byId("cancel").addEventListener("click", () => running?.abort());
byId("change-key").addEventListener("click", changeKey);
start();
