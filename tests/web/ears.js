// Runs before the page: a microphone into which a test speaks, and ears of the test's own for what the page plays.
// ears.film records the tab with both sides of the call.

(() => {
  const ears = (window.ears = { heard: [], denied: false });
  const context = new AudioContext({ sampleRate: 48000 });
  const microphone = context.createMediaStreamDestination();
  const call = context.createMediaStreamDestination();

  const ask = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices);
  navigator.mediaDevices.getUserMedia = async (constraints) => {
    if (ears.denied) throw new DOMException("Permission denied", "NotAllowedError");
    for (const track of (await ask(constraints)).getTracks()) track.stop();
    await context.resume();
    return microphone.stream.clone();
  };

  /** Say PCM16 samples (base64) of a rate into the microphone. */
  ears.say = (base64, rate) => {
    const bytes = Uint8Array.from(atob(base64), (char) => char.charCodeAt(0));
    const samples = Float32Array.from(new Int16Array(bytes.buffer), (sample) => sample / 32768);
    const buffer = context.createBuffer(1, samples.length, rate);
    buffer.copyToChannel(samples, 0);
    const source = new AudioBufferSourceNode(context, { buffer });
    source.connect(microphone);
    source.connect(call);
    source.start();
  };

  // In the audio thread, since the page's own may be busy: dBFS of every 20 ms.
  const loudness = `registerProcessor("loudness", class extends AudioWorkletProcessor {
    power = 0;
    count = 0;
    process([[samples]]) {
      for (const sample of samples ?? []) {
        this.power += sample * sample;
        if (++this.count < 960) continue;
        this.port.postMessage(10 * Math.log10(this.power / 960 + 1e-10));
        this.power = this.count = 0;
      }
      return true;
    }
  })`;
  const ready = context.audioWorklet.addModule(URL.createObjectURL(new Blob([loudness], { type: "text/javascript" })));
  const listen = async (track) => {
    await ready;
    const meter = new AudioWorkletNode(context, "loudness");
    meter.port.onmessage = ({ data }) => ears.heard.push([performance.now(), data]);
    const voice = context.createMediaStreamSource(new MediaStream([track]));
    voice.connect(meter);
    voice.connect(call);
  };
  const Connection = window.RTCPeerConnection;
  window.RTCPeerConnection = class extends Connection {
    constructor(...options) {
      super(...options);
      this.addEventListener("track", ({ track }) => track.kind === "audio" && listen(track));
    }
  };

  /** Record the tab with both sides of the call, until ears.cut() resolves to WebM in base64. */
  ears.film = async (framesPerSecond) => {
    const video = { frameRate: framesPerSecond, width: innerWidth, height: innerHeight };
    const screen = await navigator.mediaDevices.getDisplayMedia({ video, preferCurrentTab: true });
    const both = new MediaStream([...screen.getVideoTracks(), ...call.stream.getAudioTracks()]);
    const recorder = new MediaRecorder(both, { mimeType: "video/webm;codecs=vp8,opus", videoBitsPerSecond: 500_000 });
    const parts = [];
    recorder.ondataavailable = ({ data }) => parts.push(data);
    recorder.start(1000);
    ears.cut = () =>
      new Promise((resolve) => {
        recorder.onstop = () => {
          const reader = new FileReader();
          reader.onload = () => resolve(reader.result.split(",")[1]);
          reader.readAsDataURL(new Blob(parts));
        };
        recorder.stop();
        for (const track of screen.getTracks()) track.stop();
      });
  };
})();
