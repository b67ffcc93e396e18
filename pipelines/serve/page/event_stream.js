/** Server-sent events out of a fetch: `EventSource` could not POST, nor send a key. */

/** The events of a `Response`, as `{ event, data }`; ends the request when left early. */
export async function* events(response) {
  let event = "message";
  let data = [];
  for await (const line of lines(texts(response.body))) {
    if (line === "") {
      if (data.length) yield { event, data: data.join("\n") };
      [event, data] = ["message", []];
      continue;
    }
    const [field, value] = parts(line);
    if (field === "event") event = value;
    if (field === "data") data.push(value);
  }
}

/** `field: value`; a comment has an empty field. */
function parts(line) {
  const colon = line.indexOf(":");
  if (colon < 0) return [line, ""];
  return [line.slice(0, colon), line.slice(colon + 1).replace(/^ /, "")];
}

async function* texts(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield value;
    }
  } finally {
    // Rejects where the request failed, which the read has told already.
    reader.cancel().catch(() => {});
  }
}

/** Whole lines, whatever the chunks; a CR at the end of a chunk may be half of a CRLF. */
async function* lines(chunks) {
  let rest = "";
  for await (const chunk of chunks) {
    const hasEnd = rest.endsWith("\r") || /[\r\n]/.test(chunk);
    rest += chunk;
    // An image is one line of megabytes: `rest` is looked through once, when its end is there.
    if (!hasEnd) continue;
    const whole = rest.split(/\r\n|\n|\r(?!$)/);
    rest = whole.pop();
    yield* whole;
  }
}
