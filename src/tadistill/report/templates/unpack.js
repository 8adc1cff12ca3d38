"use strict";
// Long parts of the page are packed (DEFLATE of RFC 1951, in base64). `unpack` writes one of them while the browser parses the page. So the
// page is the same as one that has the parts as they are: its scripts, links to sections, and what is printed.
document.currentScript.remove();
{
  window.unpack = (text, size) => {
    document.currentScript.remove();
    document.write(new TextDecoder().decode(inflated(Uint8Array.from(atob(text), (character) => character.charCodeAt(0)), size)));
  };

  function inflated(bytes, size) {
    const out = new Uint8Array(size);
    let written = 0, read = 0, held = 0, count = 0;  // the lowest `count` bits of `held` are the next ones
    const hold = (n) => {
      for (; count < n; count += 8) held |= bytes[read++] << count;
    };
    const drop = (n) => {
      held >>>= n;
      count -= n;
    };
    const bits = (n) => {
      hold(n);
      const found = held & ((1 << n) - 1);
      drop(n);
      return found;
    };
    const symbol = (table) => {
      hold(15);
      const found = table[held & 32767];
      drop(found & 15);
      return found >> 4;
    };
    const block = (literals, distances) => {
      for (let next = symbol(literals); next !== 256; next = symbol(literals)) {
        if (next < 256) {
          out[written++] = next;
          continue;
        }
        const length = next === 285 ? 258 : 3 + number(next - 257, 4);
        for (let from = written - 1 - number(symbol(distances), 2), end = written + length; written < end;) out[written++] = out[from++];
      }
    };
    // a length or a distance: `steps` symbols in turn have the same number of further bits
    const number = (of, steps) => {
      if (of < 2 * steps) return of;
      const more = Math.floor(of / steps) - 1;
      return ((steps + (of % steps)) << more) + bits(more);
    };
    for (let last = 0; !last;) {
      last = bits(1);
      const kind = bits(2);
      if (kind === 0) {
        drop(count % 8);
        const end = written + bits(16);
        bits(16);  // the complement of the length
        while (written < end) out[written++] = bits(8);
      } else if (kind === 1) {
        block(codes([[8, 144], [9, 112], [7, 24], [8, 8]].flatMap(([length, n]) => Array(n).fill(length))), codes(Array(30).fill(5)));
      } else {
        const [literals, distances, n] = [257 + bits(5), 1 + bits(5), 4 + bits(4)];
        const first = Array(19).fill(0);
        for (const i of [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15].slice(0, n)) first[i] = bits(3);
        const [table, lengths] = [codes(first), []];
        while (lengths.length < literals + distances) {
          const next = symbol(table);
          const [value, times] =
            next < 16 ? [next, 1] : next === 16 ? [lengths[lengths.length - 1], 3 + bits(2)] : [0, next === 17 ? 3 + bits(3) : 11 + bits(7)];
          for (let i = 0; i < times; i++) lengths.push(value);
        }
        block(codes(lengths.slice(0, literals)), codes(lengths.slice(literals)));
      }
    }
    return out;
  }

  // Returns a table of a Huffman code: at each value of the next 15 bits, a symbol and the length of its code in the lowest 4 bits.
  function codes(lengths) {
    const table = new Uint16Array(1 << 15);
    let code = 0;
    for (let length = 1; length <= 15; length++, code <<= 1) {
      lengths.forEach((own, symbol) => {
        if (own !== length) return;
        let reversed = 0;
        for (let i = 0; i < length; i++) reversed |= ((code >> i) & 1) << (length - 1 - i);
        for (let i = reversed; i < table.length; i += 1 << length) table[i] = (symbol << 4) | length;
        code++;
      });
    }
    return table;
  }
}
