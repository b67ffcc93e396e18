/** Elements of the page: by id, as copies of its templates, and the line that screen readers speak. */

export const byId = (id) => document.getElementById(id);

/** A copy of a `<template>`'s element as `root`, and its `data-part`s by name. */
export function copyOf(templateId) {
  const root = byId(templateId).content.firstElementChild.cloneNode(true);
  const named = [...root.querySelectorAll("[data-part]")].map((node) => [node.dataset.part, node]);
  return { root, ...Object.fromEntries(named) };
}

/** A text that stays is not set again: screen readers would say an alert each time. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Make `[value, text]` the options of a select. */
export function setOptions(select, options) {
  select.replaceChildren(...options.map(([value, text]) => new Option(text, value)));
}

/** Bring an element into view where it is not, without motion for those who want none. */
export function reveal(element) {
  element.scrollIntoView({ block: "nearest", behavior: wantsStillness() ? "auto" : "smooth" });
}

export const wantsStillness = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

export function announce(text) {
  byId("announcer").textContent = text;
}
