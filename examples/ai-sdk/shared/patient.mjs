// A model of 135M parameters may go on inside a string without end: then the limit cuts the answer, which says nothing
// about the server. Only then is it asked again; an object that ended and does not fit its schema fails at once.

const TRIES = 8;

// ask(seed) makes an object.
export async function untilItEnds(NoObjectGeneratedError, ask) {
  for (let seed = 1; ; seed++) {
    try {
      return await ask(seed);
    } catch (error) {
      if (seed === TRIES || !NoObjectGeneratedError.isInstance(error) || error.finishReason !== 'length') throw error;
    }
  }
}

// ask(seed) makes a text.
export async function untilItStops(ask) {
  let result;
  for (let seed = 1; seed <= TRIES && result?.finishReason !== 'stop'; seed++) result = await ask(seed);
  return result;
}
