// Verbatim overlaps of a query and an example: runs of words that both have.

const LEAST_WORDS = 3; // of a run; a query of fewer words is looked for whole

function words(text) {
  return [...text.matchAll(/[\p{L}\p{N}\p{M}_'’-]+|[^\s\p{L}\p{N}\p{M}]/gu)].map((match) => ({ word: match[0].toLowerCase(), start: match.index, end: match.index + match[0].length }));
}

// Ranges of characters of the example that are in the query, too: the longest runs first, none inside another.
export function overlaps(query, example) {
  const [asked, own] = [words(query), words(example)];
  const least = Math.min(LEAST_WORDS, asked.length);
  if (!least || asked.length * own.length > 4e6) return [];
  const runs = [];
  let before = new Uint16Array(own.length + 1);
  for (let i = 1; i <= asked.length; i++) {
    const lengths = new Uint16Array(own.length + 1);
    for (let j = 1; j <= own.length; j++) {
      if (asked[i - 1].word !== own[j - 1].word) continue;
      lengths[j] = before[j - 1] + 1;
      const goesOn = i < asked.length && j < own.length && asked[i].word === own[j].word;
      if (lengths[j] >= least && !goesOn) runs.push({ first: j - lengths[j], last: j });
    }
    before = lengths;
  }
  const taken = new Uint8Array(own.length);
  const found = [];
  for (const { first, last } of runs.sort((a, b) => b.last - b.first - (a.last - a.first))) {
    if (taken.subarray(first, last).some(Boolean)) continue;
    taken.fill(1, first, last);
    found.push({ start: own[first].start, end: own[last - 1].end, words: last - first });
  }
  return found.sort((a, b) => a.start - b.start);
}

export const overlapWords = (ranges) => ranges.reduce((sum, range) => sum + range.words, 0);

// A text cut at the ends of ranges: [text, whether it is inside one].
export function pieces(text, ranges, offset = 0) {
  const cut = [];
  let place = 0;
  for (const range of ranges) {
    const [start, end] = [Math.max(range.start - offset, place), Math.min(range.end - offset, text.length)];
    if (end <= start) continue;
    if (start > place) cut.push([text.slice(place, start), false]);
    cut.push([text.slice(start, end), true]);
    place = end;
  }
  if (place < text.length) cut.push([text.slice(place), false]);
  return cut;
}
