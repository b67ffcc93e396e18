/** JSON whose seeds keep all 63 bits: a number of JavaScript holds 53, so seeds are digits in a string. */

/** A quote inside of a JSON string is escaped, so neither pattern can match there. */
const NUMBER = /"seed"\s*:\s*(\d+)/g;
const STRING = /"seed":"(\d+)"/g;

export const parse = (text) => JSON.parse(text.replace(NUMBER, '"seed":"$1"'));

export const stringify = (value) => JSON.stringify(value).replace(STRING, '"seed":$1');
