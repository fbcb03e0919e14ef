// Hears when somebody speaks, so that hands-free sends speech and nothing else: a voice is louder than the background, and it has a pitch.
const LOUDER = 2.5;          // times the background (8 dB)
const LEAST = 0.002;         // what is below this level does not count, however quiet the room
const PITCHED = 0.5;         // likeness of the sound to itself one period of a voice earlier: 1 for a tone, about 0.2 for noise
const MEMORY = 2;            // seconds; the quiet moments in them are the background, also while somebody speaks
const STARTS = 0.1;          // seconds of voice within RECENT that begin a query: a click or a knock has less
const RECENT = 0.25;         // seconds
const PAUSE = 0.8;           // seconds without voice that end it

export class Ear {
  constructor() { this.levels = []; this.last = this.high = 0; this.forget(); }
  forget() { this.voices = []; this.quiet = 0; this.speaking = false; }
  hear(data, rate) {            // one piece of about 50 ms: "silence", "began", "speech" or "ended"
    const seconds = data.length / rate, sound = this.band(data, rate), level = Math.sqrt(alike(sound, 0));
    this.levels = [...this.levels, level].slice(-Math.round(MEMORY / seconds));
    const background = [...this.levels].sort((a, b) => a - b)[this.levels.length >> 3];
    const voice = level > Math.max(LEAST, LOUDER * background) && pitch(sound) > PITCHED;
    this.voices = [...this.voices, voice].slice(-Math.round(RECENT / seconds));
    this.quiet = voice ? 0 : this.quiet + seconds;
    if (!this.speaking) return this.voices.filter(Boolean).length * seconds < STARTS ? "silence" : ((this.speaking = true), "began");
    return this.quiet < PAUSE ? "speech" : (this.forget(), "ended");
  }
  band(data, rate) {            // at 8000 samples a second, without most of what lies below a voice: wind, traffic, hum
    const step = Math.max(1, Math.round(rate / 8000)), sound = new Float32Array(Math.floor(data.length / step));
    for (let i = 0; i < sound.length; i++) {
      let mean = 0;
      for (let j = 0; j < step; j++) mean += data[i * step + j] / step;
      sound[i] = this.high = 0.9 * (this.high + mean - this.last);
      this.last = mean;
    }
    return sound;
  }
}

function alike(x, lag) {        // the mean product of a sound with itself so many samples later; with lag 0 its power
  let sum = 0;
  for (let i = lag; i < x.length; i++) sum += x[i] * x[i - lag];
  return sum / (x.length - lag);
}

function pitch(x) {             // how well a sound repeats itself after the best period of a voice, 70 to 400 Hz
  let best = 0;
  for (let lag = 20; lag <= 114; lag++) best = Math.max(best, alike(x, lag));
  return best / (alike(x, 0) + 1e-12);
}
