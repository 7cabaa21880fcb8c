"""Sounds of the procedural scenes: dry mono signals, synthesised event by event.

A class is a function `(rng, rate) -> strike`: it draws the timbre of one source; `strike(event)`
is the waveform of one event. Every waveform begins at its event's frame with an attack of at most
ten milliseconds, is scaled to the peak of its class times its strength and is damped by the next
event, so the peak of a source one metre away never exceeds that of its class.

Axes: p sample.
"""

from collections.abc import Callable, Sequence

import numpy as np
from scipy import signal

from data.scene_plan import FPS, Event, Kind

Strike = Callable[[Event], np.ndarray]
Maker = Callable[[np.random.Generator, int], Strike]

VOWELS = (  # First three formants in Hz.
  (730, 1090, 2440),  # a
  (530, 1840, 2480),  # e
  (290, 2290, 3010),  # i
  (500, 880, 2410),  # o
  (320, 800, 2240),  # u
)
SCALE = (1.0, 1.122, 1.26, 1.498, 1.682)


def _clock(event: Event, rate: int) -> np.ndarray:
  """Time axis of an event in seconds."""
  return np.arange(event.length * rate // FPS) / rate


def _partials(t_p: np.ndarray, hertz: np.ndarray, decay_s: np.ndarray) -> np.ndarray:
  """Sum of decaying sines, amplitudes 1/sqrt(k); those above 45 % of the rate are left out."""
  out_p = np.zeros_like(t_p)
  limit = 0.45 / (t_p[1] - t_p[0])
  for number, (f, tau) in enumerate(zip(hertz, decay_s, strict=True), start=1):
    if f < limit:
      out_p += np.sin(2 * np.pi * f * t_p) * np.exp(-t_p / tau) / np.sqrt(number)
  return out_p


def _gate(t_p: np.ndarray, attack: float, release: float) -> np.ndarray:
  """Envelope that opens in `attack` seconds and closes in the last `release` seconds."""
  left_p = t_p[-1] - t_p
  return np.minimum(1.0, t_p / attack) * np.minimum(1.0, left_p / release)


def _band_noise(rng: np.random.Generator, size: int, rate: int, low: float, high: float):
  """White noise limited to a band by a smooth edge in the frequency domain."""
  spectrum = np.fft.rfft(rng.standard_normal(size))
  f = np.fft.rfftfreq(size, 1 / rate)
  shape = 1 / (1 + (low / np.maximum(f, 1.0)) ** 6) / (1 + (f / high) ** 8)
  return np.fft.irfft(spectrum * shape, size)


def drum(rng: np.random.Generator, rate: int) -> Strike:
  """Membrane modes around 100 Hz with a falling pitch under the rattle of a snare."""
  base = rng.uniform(80, 150)

  def strike(event: Event) -> np.ndarray:
    t_p = _clock(event, rate)
    bent_p = t_p + 0.012 * (1 - np.exp(-t_p / 0.03))
    modes = base * np.array([1.0, 1.59, 2.14, 2.65])
    noise_p = _band_noise(rng, t_p.size, rate, 1200, 6500) * np.exp(-t_p / 0.07)
    body_p = np.sin(2 * np.pi * modes[:, None] * bent_p[None, :])
    decay_p = np.exp(-t_p[None, :] / np.array([0.16, 0.09, 0.07, 0.05])[:, None])
    return 0.5 * (body_p * decay_p).sum(0) + 2.5 * noise_p

  return strike


def ball(rng: np.random.Generator, rate: int) -> Strike:
  """A thump whose pitch rises: rubber on a floor."""
  base = rng.uniform(220, 320)

  def strike(event: Event) -> np.ndarray:
    t_p = _clock(event, rate)
    phase_p = base * (t_p + 1.8 * t_p**2)
    thump_p = np.sin(2 * np.pi * phase_p) + 0.5 * np.sin(4 * np.pi * phase_p)
    slap_p = _band_noise(rng, t_p.size, rate, 1500, 6000) * np.exp(-t_p / 0.04)
    return 0.4 * thump_p * np.exp(-t_p / 0.06) + 2.0 * slap_p

  return strike


def woodblock(rng: np.random.Generator, rate: int) -> Strike:
  """Short damped modes above 1 kHz behind a click."""
  base = rng.uniform(1000, 1700)

  def strike(event: Event) -> np.ndarray:
    t_p = _clock(event, rate)
    click_p = rng.standard_normal(t_p.size) * np.exp(-t_p / 0.002)
    return (
      _partials(t_p, base * np.array([1, 1.52, 2.57]), np.array([0.035, 0.025, 0.015]))
      + 0.4 * click_p
    )

  return strike


def bell(rng: np.random.Generator, rate: int) -> Strike:
  """Inharmonic partials that ring for a second."""
  ratios = np.array([0.5, 1.0, 1.19, 1.5, 2.0, 2.66, 3.01, 4.1])
  base = rng.uniform(480, 900)

  def strike(event: Event) -> np.ndarray:
    t_p = _clock(event, rate)
    return _partials(t_p, base * ratios, 0.55 / ratios**0.6) * np.minimum(1, t_p / 0.001)

  return strike


def fan(rng: np.random.Generator, rate: int) -> Strike:
  """Harmonics of a motor and rushing air, both chopped by the blades."""
  base, blades = rng.uniform(90, 140), rng.uniform(11, 15)
  number = np.arange(1, 25)
  phases = rng.uniform(0, 2 * np.pi, number.size)

  def strike(event: Event) -> np.ndarray:
    t_p = _clock(event, rate)
    buzz_p = np.sin(2 * np.pi * base * number[:, None] * t_p[None, :] + phases[:, None])
    buzz_p = (buzz_p / number[:, None] ** 0.8).sum(0)
    air_p = 2.0 * _band_noise(rng, t_p.size, rate, 200, 1800)
    chop_p = 1 + 0.4 * np.sin(2 * np.pi * blades * t_p)
    return (buzz_p + air_p) * chop_p * _gate(t_p, 0.01, 0.06)

  return strike


def siren(rng: np.random.Generator, rate: int) -> Strike:
  """Hollow beeps; the event's tone chooses between two pitches a fourth apart."""
  base = rng.uniform(650, 1000)

  def strike(event: Event) -> np.ndarray:
    t_p = _clock(event, rate)
    f = base * (1.0, 1.335)[event.tone]
    number = np.array([k for k in (1, 3, 5) if f * k < 0.45 * rate])[:, None]
    wave_p = (np.sin(2 * np.pi * f * number * t_p[None, :]) / number).sum(0)
    return wave_p * _gate(t_p, 0.003, 0.02)

  return strike


def voice(rng: np.random.Generator, rate: int) -> Strike:
  """Glottal pulses through the formants of a vowel, with the melody of a syllable."""
  base, size = rng.uniform(95, 230), rng.uniform(0.95, 1.15)
  number = np.arange(1, int(4500 / base))

  def strike(event: Event) -> np.ndarray:
    t_p = _clock(event, rate)
    f0_p = base * (1.08 - 0.25 * t_p / t_p[-1] + 0.02 * np.sin(2 * np.pi * 5 * t_p))
    phase_p = 2 * np.pi * np.cumsum(f0_p) / rate
    f = base * number
    centre = size * np.array(VOWELS[event.tone])[:, None]
    width, height = np.array([90, 110, 160])[:, None], np.array([1, 0.6, 0.35])[:, None]
    gain = (height / (1 + ((f[None, :] - centre) / width) ** 2)).sum(0)
    wave_p = np.sin(number[:, None] * phase_p[None, :])
    return ((gain + 0.01)[:, None] * wave_p).sum(0) * _gate(t_p, 0.01, 0.06)

  return strike


def steam(rng: np.random.Generator, rate: int) -> Strike:
  """Flickering noise above 2 kHz."""
  low = rng.uniform(1800, 2800)

  def strike(event: Event) -> np.ndarray:
    t_p = _clock(event, rate)
    hiss_p = _band_noise(rng, t_p.size, rate, low, 0.42 * rate if rate < 20000 else 9000.0)
    flicker_p = 1 + 0.5 * _band_noise(rng, t_p.size, rate, 8, 30) * np.sqrt(rate / 60)
    return hiss_p * np.clip(flicker_p, 0.3, 2) * _gate(t_p, 0.006, 0.05)

  return strike


def guitar(rng: np.random.Generator, rate: int) -> Strike:
  """A plucked string (Karplus and Strong, 1983)."""
  base = rng.uniform(130, 220)

  def strike(event: Event) -> np.ndarray:
    t_p = _clock(event, rate)
    period = int(round(rate / (base * SCALE[event.tone])))
    burst_p = np.zeros(t_p.size)
    burst_p[1 : period + 1] = rng.uniform(-1, 1, period)
    feedback = np.zeros(period + 2)
    feedback[0], feedback[period], feedback[period + 1] = 1.0, -0.498, -0.498
    string_p = np.asarray(signal.lfilter([1.0], feedback, burst_p))
    # Steel rather than nylon: the upper partials are lifted, the lowest held back.
    bright_p = string_p - 0.85 * np.concatenate([[0.0], string_p[:-1]])
    return bright_p * np.exp(-t_p / 0.5)

  return strike


def bird(rng: np.random.Generator, rate: int) -> Strike:
  """Chirps: swept whistles; the event's tone chooses rising, falling or arched."""
  base = rng.uniform(2400, 3300)

  def strike(event: Event) -> np.ndarray:
    t_p = _clock(event, rate)
    u_p = t_p / t_p[-1]
    bend_p = (u_p, 1 - u_p, np.sin(np.pi * u_p))[event.tone]
    phase_p = 2 * np.pi * np.cumsum(base * (0.85 + 0.55 * bend_p)) / rate
    trill_p = 1 - 0.35 * (0.5 - 0.5 * np.cos(2 * np.pi * 28 * t_p))
    return np.sin(phase_p) * trill_p * _gate(t_p, 0.004, 0.03)

  return strike


MAKERS: dict[str, Maker] = {
  "drum": drum,
  "ball": ball,
  "woodblock": woodblock,
  "bell": bell,
  "fan": fan,
  "siren": siren,
  "voice": voice,
  "steam": steam,
  "guitar": guitar,
  "bird": bird,
}


def synthesise(
  kind: Kind, events: Sequence[Event], rng: np.random.Generator, rate: int, samples: int
) -> np.ndarray:
  """Dry signal of one source, as heard one metre away in the open.

  Args:
    kind: sound class.
    events: attacks in the order of time; an event may ring until the next one at most.
    rng: draws timbre and noise.
    rate: samples per second, a multiple of 25.
    samples: length.

  Returns:
    Float64 [p], absolute peak at most `kind.peak`.
  """
  strike = MAKERS[kind.name](rng, rate)
  out_p = np.zeros(samples)
  fade_p = np.linspace(1.0, 0.0, rate // 125)
  for event in events:
    wave_p = strike(event)
    wave_p *= kind.peak * event.strength / np.abs(wave_p).max()
    wave_p[-fade_p.size :] *= fade_p
    start = event.frame * rate // FPS
    wave_p = wave_p[: samples - start]
    out_p[start : start + wave_p.size] += wave_p
  return out_p
