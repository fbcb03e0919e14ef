// Runs in the audio thread: hands the microphone's samples to the page, in pieces of about 50 ms.
class Recorder extends AudioWorkletProcessor {
  constructor() { super(); this.piece = new Float32Array(Math.round(sampleRate / 20)); this.filled = 0; }
  process(inputs) {
    const channel = inputs[0][0];
    if (!channel) return true;
    for (const sample of channel) {
      this.piece[this.filled++] = sample;
      if (this.filled === this.piece.length) { this.port.postMessage(this.piece.slice()); this.filled = 0; }
    }
    return true;
  }
}
registerProcessor("recorder", Recorder);
