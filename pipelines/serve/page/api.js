/** Calls of the server, with the user's key, and its errors in words. */

import { events } from "./event_stream.js";
import { parse, stringify } from "./exact_json.js";

const KEY = "api-key";

export class ApiError extends Error {
  constructor(message, status, retryAfterS = null) {
    super(message);
    Object.assign(this, { status, retryAfterS });
  }
}

export const key = () => sessionStorage.getItem(KEY);

export const keepKey = (text) => sessionStorage.setItem(KEY, text);

/** What a request needs to be let in; empty without a key. */
export const authHeaders = () => (key() ? { Authorization: `Bearer ${key()}` } : {});

/** Relative to the page, so that the server may live below a path. */
export const urlOf = (path) => new URL(path, document.baseURI).href;

export const jobPath = (id, rest = "") => `v1/jobs/${encodeURIComponent(id)}${rest}`;

export async function getJson(path) {
  return parse(await (await send(path)).text());
}

export async function postJson(path, body) {
  return parse(await (await send(path, { method: "POST", ...withJson(body) })).text());
}

export async function getBlob(path) {
  return (await send(path)).blob();
}

/** POST, then the events of the answer with their JSON; an `error` event is thrown. */
export async function* postForEvents(path, body, signal) {
  const response = await send(path, { method: "POST", signal, ...withJson(body) });
  try {
    for await (const { data } of events(response)) {
      const content = parse(data);
      if (content.error) throw new ApiError(content.error.message, response.status);
      yield content;
    }
  } catch (error) {
    throw asApiError(error);
  }
}

/** An error in one line for the user. */
export function told(error) {
  const message = error.message.replace(/[^.!?]$/, "$&.");
  return error.retryAfterS ? `${message} Try again in ${error.retryAfterS} s.` : message;
}

/** What fetch throws where no answer came, or not the whole of it, is a TypeError. */
function asApiError(error) {
  return error instanceof TypeError ? new ApiError("The server cannot be reached", 0) : error;
}

function withJson(body) {
  if (body === undefined) return {};
  return { body: stringify(body), headers: { "Content-Type": "application/json" } };
}

async function send(path, { headers, ...options } = {}) {
  const withKey = { ...options, headers: { ...headers, ...authHeaders() } };
  const response = await fetch(urlOf(path), withKey).catch((error) => {
    throw asApiError(error);
  });
  if (!response.ok) throw await errorOf(response);
  return response;
}

async function errorOf(response) {
  const retryAfterS = Number(response.headers.get("Retry-After")) || null;
  return new ApiError(await messageOf(response), response.status, retryAfterS);
}

async function messageOf(response) {
  try {
    return JSON.parse(await response.text()).error.message;
  } catch {
    // Something between the server and the page may answer in its place.
    return `The server answered with status ${response.status}`;
  }
}
