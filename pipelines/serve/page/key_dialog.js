/** The dialog that asks for the API key. */

import { keepKey, key } from "./api.js";
import { byId } from "./parts.js";

/** Ask for a key and keep it; resolves to false where the user gives none. */
export function askKey(reason = "") {
  const dialog = byId("key-dialog");
  byId("key-alert").textContent = reason;
  byId("key").value = "";
  byId("change-key").hidden = false;
  dialog.returnValue = "";
  if (!dialog.open) dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "given"), { once: true });
  });
}

export function connectKeyDialog() {
  const dialog = byId("key-dialog");
  byId("change-key").hidden = !key();
  byId("key-close").addEventListener("click", () => dialog.close());
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    keepKey(byId("key").value);
    dialog.close("given");
  });
}
