// Which experts a token went to, layer by layer: the answer's `routed_experts`, a .npy file in base64 of integers
// [rows, layers, top_k], -1 in a layer without experts; and `routed_weights`, of the same shape, where the server sends
// them. A row belongs to the position that was read, the token that it led to comes one later; so the rows of an answer
// are the last ones, as many as it has tokens.

const READERS = {
  "|u1": Uint8Array,
  "|i1": Int8Array,
  "<u2": Uint16Array,
  "<i2": Int16Array,
  "<i4": Int32Array,
  "<u4": Uint32Array,
  "<f4": Float32Array,
};

export class Layers {
  constructor(values, [rows, layers, topK]) {
    Object.assign(this, { values, rows, layers, topK });
  }

  /** Read the base64; null where it is no .npy of the expected kind. */
  static read(base64) {
    try {
      return parsed(Uint8Array.from(atob(base64), (char) => char.charCodeAt(0)));
    } catch {
      return null;
    }
  }

  /** For token `at` of an answer of `count` tokens: per layer the values, the first chosen's first; null if not traced. */
  of(at, count) {
    const row = this.rows - count + at;
    if (row < 0 || row >= this.rows) return null;
    return Array.from({ length: this.layers }, (_, layer) => {
      const from = (row * this.layers + layer) * this.topK;
      return [...this.values.subarray(from, from + this.topK)];
    });
  }
}

function parsed(bytes) {
  if (String.fromCharCode(...bytes.subarray(1, 6)) !== "NUMPY") return null;
  const view = new DataView(bytes.buffer);
  const long = bytes[6] > 1;
  const start = long ? 12 : 10;
  const length = long ? view.getUint32(8, true) : view.getUint16(8, true);
  const header = String.fromCharCode(...bytes.subarray(start, start + length));
  const type = READERS[/'descr':\s*'([^']+)'/.exec(header)?.[1]];
  const shape = /'shape':\s*\(([^)]*)\)/
    .exec(header)?.[1]
    .split(",")
    .filter((part) => part.trim())
    .map(Number);
  if (!type || shape?.length !== 3 || !/'fortran_order':\s*False/.test(header)) return null;
  const body = bytes.slice(start + length);
  const values = new type(body.buffer, 0, shape[0] * shape[1] * shape[2]);
  return new Layers(values, shape);
}
