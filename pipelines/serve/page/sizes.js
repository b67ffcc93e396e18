/** Sizes worth suggesting: those a model can make, around the one that it was trained for. */

const SQUARE_SCALES = [0.5, 0.75, 1, 1.5, 2, 3, 4];
const RATIOS = [4 / 3, 3 / 2, 16 / 9, 2];

/** "WxH" → [width, height] in pixels. */
export const sides = (size) => size.split("x").map(Number);

export const shown = (size) => size.replace("x", " × ");

/** `{ Square, Landscape, Portrait }`, each a list of "WxH" in ascending order; the default is among them. */
export function suggestedSizes({ default_size, size_multiple_px, max_side_px }) {
  const [width, height] = sides(default_size);
  const side = Math.sqrt(width * height);
  const squares = SQUARE_SCALES.map((scale) => [side * scale, side * scale]);
  // Of the default's area, or where that is too long, as long as may be.
  const landscapes = RATIOS.map((ratio) => {
    const long = Math.min(side * Math.sqrt(ratio), max_side_px);
    return [long, long / ratio];
  });
  const rounded = [...squares, ...landscapes, ...landscapes.map(([w, h]) => [h, w])]
    .map((pair) => pair.map((px) => Math.round(px / size_multiple_px) * size_multiple_px))
    .filter((pair) => pair.every((px) => px > 0 && px <= max_side_px));
  return byShape([[width, height], ...rounded]);
}

function byShape(pairs) {
  const groups = { Square: [], Landscape: [], Portrait: [] };
  for (const [width, height] of pairs.sort((a, b) => a[0] - b[0] || a[1] - b[1])) {
    const group = groups[width === height ? "Square" : width > height ? "Landscape" : "Portrait"];
    const size = `${width}x${height}`;
    if (!group.includes(size)) group.push(size);
  }
  return groups;
}
