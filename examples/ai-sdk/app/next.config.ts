import type { NextConfig } from 'next';

// `next dev` asks npm's registry whether Next.js is current. This app talks to its model server and to nobody else.
const { fetch } = globalThis;
globalThis.fetch = (input, init) =>
  String(input).startsWith('https://registry.npmjs.org/')
    ? Promise.reject(new Error('the registry is not asked'))
    : fetch(input, init);

const config: NextConfig = {
  turbopack: { root: import.meta.dirname }, // other lock files lie above this folder
  devIndicators: false,
  poweredByHeader: false,
};

export default config;
