// Objects from a small model: another try where one had no end, and settings against saying one thing for ever.
export { untilItEnds, untilItStops } from '../../shared/patient.mjs';

export const endingSoon = (seed) => ({ temperature: 1, presencePenalty: 1, maxOutputTokens: 400, seed });
