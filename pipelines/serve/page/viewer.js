/** The deep-zoom view: one dialog over the page, closed by Escape. */

import { authHeaders } from "./api.js";
import { byId, wantsStillness } from "./parts.js";

const ZOOM_STEP = 1.5;
/** Keys with which OpenSeadragon would turn or mirror the image. */
const UNWANTED_KEYS = ["KeyR", "KeyF"];
/** Tiles asked for at once. */
const MAX_LOADS = 6;

let library = null;
let viewer = null;

/** Show a source of OpenSeadragon: the URL of a .dzi, or `{ type: "image", url }`. */
export async function view(title, source) {
  const dialog = byId("viewer");
  byId("viewer-title").textContent = title;
  byId("viewer-alert").textContent = "";
  dialog.showModal();
  try {
    await (library ??= load());
  } catch {
    library = null;
    return fail("The viewer cannot be loaded.");
  }
  if (dialog.open) show(source);
}

export function connectViewer() {
  const dialog = byId("viewer");
  byId("viewer-close").addEventListener("click", () => dialog.close());
  byId("zoom-in").addEventListener("click", () => zoom(ZOOM_STEP));
  byId("zoom-out").addEventListener("click", () => zoom(1 / ZOOM_STEP));
  byId("zoom-fit").addEventListener("click", () => viewer?.viewport?.goHome());
  dialog.addEventListener("close", close);
}

function show(source) {
  close();
  viewer = window.OpenSeadragon(options(source));
  viewer.addHandler("open-failed", () => fail("The image cannot be loaded."));
  viewer.addHandler("canvas-key", (event) => {
    event.preventDefaultAction ||= UNWANTED_KEYS.includes(event.originalEvent.code);
  });
  viewer.canvas.setAttribute("aria-label", "Image; arrow keys move it, plus and minus zoom");
  viewer.canvas.setAttribute("role", "application");
  viewer.canvas.focus();
}

/** Only tiles need the key, and only they can be had by a fetch under a strict content policy. */
const options = (source) => ({
  element: byId("viewer-canvas"),
  tileSources: source,
  loadTilesWithAjax: typeof source === "string",
  ajaxHeaders: authHeaders(),
  drawer: "canvas",
  showNavigationControl: false,
  imageLoaderLimit: MAX_LOADS,
  animationTime: wantsStillness() ? 0 : 0.5,
  maxZoomPixelRatio: 4,
  visibilityRatio: 0.5,
  gestureSettingsMouse: { clickToZoom: false, dblClickToZoom: true },
});

function zoom(factor) {
  viewer?.viewport?.zoomBy(factor);
  viewer?.viewport?.applyConstraints();
}

function close() {
  viewer?.destroy();
  viewer = null;
}

function fail(text) {
  byId("viewer-alert").textContent = text;
}

/** Only those who look closer wait for it. */
function load() {
  standInForStyle();
  return new Promise((resolve, reject) => {
    const src = new URL("vendor/openseadragon.min.js", import.meta.url).href;
    const script = Object.assign(document.createElement("script"), { src, onload: resolve, onerror: reject });
    document.head.append(script);
  });
}

/** OpenSeadragon adds a style, which a strict content policy forbids, unless it finds one; this is none. */
function standInForStyle() {
  const style = document.createElementNS(null, "style");
  style.setAttribute("data-openseadragon-mobile-css", "");
  document.head.append(style);
}
