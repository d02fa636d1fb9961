/* Reads .nncomp files and runs networks of dense layers, in a browser or in Node.js, with nothing but this file.

     const tensors = await nncomp.read(await (await fetch("net.nncomp")).arrayBuffer());
     tensors["fc1.weight"]                 // {dtype: "F32", shape: [300, 784], data: Float32Array}
     nncomp.dense(tensors, ["fc1", "fc2", "fc3"], pixels);   // logits

   The format is that of the chapter on the file, read step by step as its NumPy reader does. Numbers above 2^31 are doubles
   here, which are exact to 2^53, so the shifts of the Python text are divisions and products where they would overflow. */
const nncomp = (() => {
  "use strict";
  const TYPES = ["BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0", "U16", "I16", "F16", "BF16", "U32", "I32", "F32", "U64", "I64", "F64", "C64"];
  const WIDTHS = [1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 4, 4, 4, 8, 8, 8, 8];
  const FLOATS = new Set([3, 4, 5, 6, 7, 10, 11, 14, 17]);
  const ARRAYS = {U8: Uint8Array, I8: Int8Array, U16: Uint16Array, I16: Int16Array, U32: Uint32Array, I32: Int32Array, F32: Float32Array, F64: Float64Array};

  const bitLength = n => 32 - Math.clz32(n);                 // of n below 2^32
  const limited = (x, most) => Math.min(Math.max(x, -most), most);
  const product = list => list.reduce((a, b) => a * b, 1);
  const text = bytes => new TextDecoder().decode(bytes);
  const fail = what => { throw new Error(`nncomp: ${what}`); };

  const CRC = Uint32Array.from({length: 256}, (_, i) => {
    for (let k = 0; k < 8; k++) i = i & 1 ? 0xedb88320 ^ (i >>> 1) : i >>> 1;
    return i;
  });
  function crc32(...parts) {
    let crc = -1;
    for (const part of parts) for (const byte of part) crc = CRC[(crc ^ byte) & 255] ^ (crc >>> 8);
    return (crc ^ -1) >>> 0;
  }

  class Reader {                                             // bytes, one after the other
    constructor(bytes) { this.bytes = bytes; this.at = 0; }
    get left() { return this.bytes.length - this.at; }
    byte() { return this.at < this.bytes.length ? this.bytes[this.at++] : fail("the file ends too early"); }
    take(n) { return n <= this.left ? this.bytes.subarray(this.at, this.at += n) : fail("the file ends too early"); }
    rest() { return this.take(this.left); }
    varint() {                                               // seven bits a byte, the lowest first
      let value = 0, scale = 1, byte;
      do { byte = this.byte(); value += (byte % 128) * scale; scale *= 128; } while (byte > 127);
      return value;
    }
  }

  class Bits {                                               // bits, the lowest of a byte first
    constructor(bytes) { this.bytes = bytes; this.at = 0; }
    one() { const i = this.at++; return (this.bytes[i >> 3] >> (i & 7)) & 1; }
    number(width) { let value = 0; for (let i = 0; i < width; i++) value += this.one() * 2 ** i; return value; }
    gamma() { let digits = 0; while (!this.one()) if (++digits > 20) fail("damaged code"); return 2 ** digits + this.number(digits); }
  }
  const fields = (bytes, width, n) => { const bits = new Bits(bytes); return Array.from({length: n}, () => bits.number(width)); };

  // ---- Huffman's code (canonical; the lengths come as differences)

  function codeTable(bits) {                                 // "length:code" as a number -> symbol
    const lengths = [], codes = new Map();
    let last = 4, symbol = 0, room = 2 ** 20, code = 0;
    while (room > 0) {
      let kind = 0;
      while (kind < 3 && bits.one()) kind++;
      if (kind === 2) { symbol += bits.gamma(); continue; }
      if (kind) last += (2 * bits.one() - 1) * (kind === 1 ? 1 : bits.gamma() + 1);
      lengths.push([last, symbol++]);
      room -= 2 ** (20 - last);
    }
    lengths.sort((a, b) => a[0] - b[0] || a[1] - b[1]);
    for (const [length, s] of lengths) { codes.set(2 ** length + Math.floor(code / 2 ** (20 - length)), s); code += 2 ** (20 - length); }
    return codes;
  }

  function huffman(bytes) {
    const f = new Reader(bytes), kind = f.byte() >> 1;
    if (kind === 0) return [];
    if (kind === 1) { const symbol = f.varint(); return new Array(f.varint()).fill(symbol); }
    const n = f.varint(), streams = kind === 3 ? 4 : 1, out = [], sizes = [];
    if (kind === 4) { const width = f.byte(); return fields(f.rest(), width, n); }
    const bits = new Bits(bytes.subarray(f.at)), codes = codeTable(bits);
    f.take(Math.ceil(bits.at / 8));
    for (let i = 1; i < streams; i++) sizes.push(f.varint());
    for (let i = 0; i < streams; i++) {
      const stream = new Bits(i < streams - 1 ? f.take(sizes[i]) : f.rest());
      for (let count = Math.min(Math.ceil(n / streams), n - out.length); count > 0; count--) {
        let code = 1;                                        // a one before the bits that have been read
        do { code = 2 * code + stream.one(); } while (!codes.has(code) && code < 2 ** 21);
        out.push(codes.get(code) ?? fail("damaged code"));
      }
    }
    return out;
  }

  // ---- the arithmetic coder, its odds and its contexts

  const STRETCH = Array.from({length: 4096}, (_, i) => Math.round(256 * Math.log((i + 0.5) / (4095.5 - i))));
  const SQUASH = Array.from({length: 6143}, (_, i) => limited(Math.round(65536 / (1 + Math.exp((3071 - i) / 256))), 65535) || 1);

  class Coder {
    constructor(f, plain) {
      Object.assign(this, {f, plain, kinds: {}, inputs: [0, 0, 0], range: 2 ** 32 - 1, value: 0});
      for (let i = 0; i < 4; i++) this.value = this.value * 256 + this.next();
    }
    next() { return this.f.left ? this.f.byte() : 0; }
    narrow(start, size) {
      this.range = size; this.value -= start;
      while (this.range < 2 ** 24) { this.range *= 256; this.value = this.value * 256 + this.next(); }
    }
    split(one) {                                             // one: chance of a 1, of 65536
      const bound = Math.floor(this.range / 65536) * one, bit = this.value < bound ? 1 : 0;
      bit ? this.narrow(0, bound) : this.narrow(bound, this.range - bound);
      return bit;
    }
    bit(kind, contexts, w = 0) {                             // one bit, its odds mixed from those of up to three contexts
      const {odds, weights} = this.kinds[kind] ??= {odds: contexts.map(() => []), weights: []}, used = this.plain ? 1 : contexts.length;
      let total = 0;
      for (let i = 0; i < used; i++) {                       // odds: 1024 times the chance of a 1, of 2^22, and how often it was seen
        this.inputs[i] = STRETCH[Math.floor((odds[i][contexts[i]] ??= 2 ** 31) / 2 ** 20)];
        total += (weights[w + i] ??= 22000) * this.inputs[i];
      }
      const one = this.plain ? Math.max(Math.floor(odds[0][contexts[0]] / 65536), 1) : SQUASH[limited(Math.floor(total / 65536), 3071) + 3071];
      const bit = this.split(one);
      for (let i = 0; i < used; i++) {
        const before = odds[i][contexts[i]], seen = before % 1024, chance = (before - seen) / 1024, rate = Math.floor(655360 / (10 * seen + 18));
        odds[i][contexts[i]] = (chance + Math.floor((bit * 2 ** 22 - chance) * rate / 65536)) * 1024 + Math.min(seen + 1, 1023);
        weights[w + i] = limited(weights[w + i] + Math.floor(this.inputs[i] * (bit * 65536 - one) / 32768), 1 << 19);
      }
      return bit;
    }
  }

  function byTable(coder, n, k) {                            // symbols without contexts, from a table of how often each comes
    const table = [], starts = [0], out = [];
    for (let s = 0, last = 0; s < k; s++) {
      let node = 1;
      for (let i = 0; i < 5; i++) node = 2 * node + coder.bit("digits", [32 * last + node]);
      last = node - 32;
      let count = Math.min(last, 1);
      for (let i = 0; i < Math.min(last - 1, 4); i++) count = 2 * count + coder.split(1 << 15);
      table.push(count * 2 ** Math.max(last - 5, 0));
    }
    const sum = table.reduce((a, b) => a + b), some = table.filter(c => c).length;
    for (let s = 0, seen = 0, total = 0; s < k; s++) {
      seen += table[s] > 0; total += table[s];
      starts.push(seen + Math.floor(total * (65536 - some) / sum));
    }
    for (let i = 0; i < n; i++) {
      const step = Math.floor(coder.range / 65536), at = Math.floor(coder.value / step);
      let [low, high] = [0, k];                              // the last symbol that starts at or below `at`
      while (high - low > 1) { const middle = (low + high) >> 1; starts[middle] <= at ? low = middle : high = middle; }
      while (low > 0 && starts[low] === starts[low + 1]) low--;
      out.push(low);
      coder.narrow(step * starts[low], step * (starts[low + 1] - starts[low]));
    }
    return out;
  }

  function grid(n, shape, side) {                            // columns of a row, and height and width of the pictures in it
    const columns = shape.length > 1 && n ? Math.floor(n / shape[0]) : 0;
    if (columns < 16 || columns > 65536 || shape[0] > 2 ** 20) return [4096, 1, 4096];
    if (shape.length === 2) return side > 1 ? [columns, side, side] : [columns, 1, columns];
    return [columns, shape.length > 3 ? shape.at(-2) : 1, shape.at(-1)];
  }

  function crowd(ones, seen) {
    const level = Math.min(bitLength(2 * seen + 1) - bitLength(2 * Math.min(ones, seen - ones) + 1), 7);
    return 2 * ones <= seen ? level : 15 - level;
  }

  function arithmetic(f, n, k, shape, zero) {
    const way = f.varint(), [columns, height, width] = grid(n, shape, way), coder = new Coder(f, way === 0 || way === 2);
    if (way === 2) return byTable(coder, n, k);
    const out = new Array(n), near = new Int32Array(columns), here = new Int32Array(columns);
    const place = (image, y, x) => y >= 0 && y < height && x >= 0 && x < width ? (image * height + y) * width + x : -1;
    const at = (image, y, x) => { const p = place(image, y, x); return p < 0 ? 0 : here[p]; };
    for (let i = 0, ones = 0, last = 0; i < n; i++) {
      const row = Math.floor(i / columns), column = i % columns, block = Math.floor(column / width);
      const image = Math.floor(block / height), y = block % height, x = column % width;
      if (column === 0) { here.fill(0); ones = last = 0; }
      const around = [at(image, y, x - 1), at(image, y, x - 2), at(image, y - 1, x), at(image, y - 1, x - 1), at(image, y - 1, x + 1), at(image, y - 2, x)];
      const [left, , up, corner, other] = around;
      let pattern = 0, some = 0;
      for (let j = 0; j < 6; j++) if (around[j]) { pattern += 1 << j; some++; }
      const first = way === 0 ? 0 : pattern << 4 | crowd(near[column], 9 * row + 9);
      const before = image > 0 && here[column - height * width] !== 0 ? 1 : 0;
      let v = 0;
      if (zero < 0 || coder.bit("flag", [first, column, row], 6 * Math.min(some, 2) + 3 * before)) {
        const below = Math.max(zero, 0), above = k - 1 - zero;
        const signs = way === 0 ? 0 : [left, up, corner, other].reduce((sum, u) => 3 * sum + Math.sign(u) + 1, 0);
        const positive = below && above ? coder.bit("sign", [signs, column, row], 3 * ((left !== 0) + (up !== 0))) : Number(above > 0);
        const nearby = Math.min(bitLength(Math.max(Math.abs(left), Math.abs(up))), 7);
        const lately = 8 * Math.min(bitLength(last), 7) + Math.min(bitLength(Math.floor(column / (ones + 1))), 7);
        const bits = bitLength(Math.max((positive ? above : below) - 1, 0));
        let node = 1;
        for (let j = bits - 1; j >= 0; j--) node = 2 * node + coder.bit("size", [2 * node + positive, 8 * node + nearby, 64 * node + lately], 3 * j);
        v = (1 + node - 2 ** bits) * (positive ? 1 : -1);
        for (let b = y - 1; b <= y + 1; b++) for (let a = x - 1; a <= x + 1; a++) { const p = place(image, b, a); if (p >= 0) near[p]++; }
        here[column] = v; ones++; last = Math.abs(v);
      }
      out[i] = v + zero;
    }
    return out;
  }

  // ---- tensors

  function stream(f, n, k, shape, zero = -1) {               // n numbers below k
    const head = f.varint(), kind = head % 4, bytes = f.take(Math.floor(head / 4));
    if (kind === 2) return arithmetic(new Reader(bytes), n, k, shape, zero);
    return kind ? huffman(bytes) : fields(bytes, Math.max(bitLength(k - 1), 1), n);
  }

  function onesOf(bytes, n) {                                // where the entries that are not zero stand
    const f = new Reader(bytes), method = f.byte(), out = [];
    if (method === 1 || method === 2) {
      const map = method === 1 ? f.rest() : Uint8Array.from(huffman(f.rest())), bits = new Bits(map);
      for (let i = 0; i < Math.min(8 * map.length, n); i++) if (bits.one()) out.push(i);
      return out;
    }
    const k = f.varint();
    let at = -1;
    if (method === 0) { for (const gap of huffman(f.rest())) { at += gap; if (gap < 2 ** k - 1) out.push(++at); } return out; }
    if (method === 4) {
      const high = huffman(f.take(f.varint())), low = fields(f.rest(), k, high.length);
      return high.map((h, i) => at += h * 2 ** k + low[i] + 1);
    }
    if (method === 5) { arithmetic(f, n, 2, [Math.floor(n / Math.max(k, 1)), k], 0).forEach((v, i) => { if (v) out.push(i); }); return out; }
    const counts = fields(f.take(Math.ceil(Math.floor(n / k) * bitLength(k) / 8)), bitLength(k), Math.floor(n / k));
    const columns = fields(f.rest(), Math.max(bitLength(k - 1), 1), counts.reduce((a, b) => a + b, 0));
    let i = 0;
    counts.forEach((count, row) => { for (; count > 0; count--) out.push(row * k + columns[i++]); });
    return out;
  }

  function body(f, type, coding, shape) {                    // the bytes of one block
    const size = WIDTHS[type], n = product(shape), out = new Uint8Array(n * size), how = coding & 3;
    const ones = coding & 4 ? onesOf(f.take(f.varint()), n) : null, count = ones ? ones.length : n, near = ones ? [count] : shape;
    const put = (i, source, from) => { for (let j = 0, to = (ones ? ones[i] : i) * size; j < size; j++) out[to + j] = source[from + j]; };
    if (how < 2) {
      const values = f.rest();
      for (let i = 0; i < count; i++) put(i, values, how ? i * size % values.length : i * size);
    } else if (how === 2) {
      const book = f.take(f.varint() * size), k = book.length / size;
      let zero = -1;
      for (let j = 0; j < k && zero < 0; j++) if (book.subarray(j * size, (j + 1) * size).every(b => b === 0)) zero = j;
      stream(f, count, k, near, zero).forEach((symbol, i) => put(i, book, symbol * size));
    } else {                                                 // planes: the highest bytes first; of floats, turned left by one bit
      const values = new Uint8Array(count * size);
      for (let j = size - 1; j >= 0; j--) stream(f, count, 256, [count]).forEach((byte, i) => { values[i * size + j] = byte; });
      const turned = FLOATS.has(type) ? values.map((b, i) => b >> 1 | (values[i % size === size - 1 ? i - size + 1 : i + 1] & 1) << 7) : values;
      for (let i = 0; i < count; i++) put(i, turned, i * size);
    }
    return out;
  }

  function tensor(packed, name) {
    const sum = new DataView(packed.buffer, packed.byteOffset + packed.length - 4).getUint32(0, true);
    if (crc32(new TextEncoder().encode(name), packed.subarray(0, -4)) !== sum) fail(`${name} is damaged`);
    const f = new Reader(packed.subarray(0, -4)), type = f.byte(), coding = f.byte(), shape = Array.from({length: f.byte()}, () => 0).map(() => f.varint());
    let bytes = coding < 8 ? body(f, type, coding, shape) : new Uint8Array(product(shape) * WIDTHS[type]);
    if (coding >= 8) {                                                // blocks of whole rows
      const most = Math.floor(2 ** 24 / Math.max(WIDTHS[type], 4)), [rows, ...row] = product(shape.slice(1)) <= most ? shape : [product(shape)];
      const step = Math.floor(most / product(row));
      for (let start = 0, at = 0; start < rows; start += step) {
        const how = f.byte(), part = body(new Reader(f.take(f.varint())), type, how, [Math.min(step, rows - start), ...row]);
        bytes.set(part, at);
        at += part.length;
      }
    }
    return {dtype: TYPES[type], shape, data: new (ARRAYS[TYPES[type]] ?? Uint8Array)(bytes.buffer)};
  }

  function read(buffer) {                                    // ArrayBuffer -> {name: {dtype, shape, data}}
    const file = new Reader(new Uint8Array(buffer)), length = Number(new DataView(buffer).getBigUint64(0, true)), out = {}, own = [];
    let bundle = file.take(8);
    for (const [name, entry] of Object.entries(JSON.parse(text(file.take(length))))) {
      if (name === "__metadata__") continue;
      const bytes = file.take(entry.shape[0]);
      name === "*small*" ? bundle = new Reader(bytes.subarray(0, -4)) : own.push([name, bytes]);
    }
    while (bundle.left) {
      const size = bundle.varint(), [name, packed] = size ? [text(bundle.take(size - 1)), bundle.take(bundle.varint())] : own.shift();
      out[name] = packed[1] === 8 && packed[0] === 255 ? out[text(packed.subarray(2, -4))] : tensor(packed, name);
    }
    return out;
  }

  const half = u => (u >> 15 ? -1 : 1) * (u >> 10 & 31 ? (1 + (u & 1023) / 1024) * 2 ** ((u >> 10 & 31) - 15) : (u & 1023) / 2 ** 24);  // a finite F16
  const floats = t => t.dtype === "F16" ? Float32Array.from(new Uint16Array(t.data.buffer), half) : t.data;
  function dense(tensors, layers, x) {                       // relu between the layers; x: values of one input
    layers.forEach((layer, i) => {
      const [w, bias] = ["weight", "bias"].map(part => floats(tensors[`${layer}.${part}`])), columns = x.length;
      x = bias.map((sum, r) => {
        for (let c = 0; c < columns; c++) sum += w[r * columns + c] * x[c];
        return i < layers.length - 1 ? Math.max(sum, 0) : sum;
      });
    });
    return x;
  }

  return {read, dense};
})();
if (typeof module !== "undefined") module.exports = nncomp;
