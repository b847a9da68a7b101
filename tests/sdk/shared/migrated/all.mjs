// The guide's sections as generations 5, 6 and 7 write them. `vllm(MODEL)` means the Responses API there, and a
// section's `both` runs a case on it and once more on chat completions. draining.mjs ends a server, so it comes last.
import advancedConfiguration from './advanced-configuration.mjs';
import bestPractices from './best-practices.mjs';
import completionModel from './completion-model.mjs';
import draining from './draining.mjs';
import embeddings from './embeddings.mjs';
import errorHandling from './error-handling.mjs';
import guidedGeneration from './guided-generation.mjs';
import hooks from './hooks.mjs';
import monitoring from './monitoring.mjs';
import responses from './responses.mjs';
import serverComponents from './server-components.mjs';
import structuredOutput from './structured-output.mjs';
import textGeneration from './text-generation.mjs';
import tools from './tools.mjs';
import troubleshooting from './troubleshooting.mjs';

const SECTIONS = [
  textGeneration,
  structuredOutput,
  tools,
  serverComponents,
  hooks,
  advancedConfiguration,
  guidedGeneration,
  embeddings,
  completionModel,
  responses,
  errorHandling,
  monitoring,
  bestPractices,
  troubleshooting,
  draining,
];

// SDK_SECTION picks one by its file's name, for a person at work.
export function register(sdk) {
  const wanted = (process.env.SDK_SECTION ?? '').replaceAll('-', '');
  for (const section of SECTIONS) {
    if (wanted === '' || section.name.toLowerCase() === wanted) section(sdk);
  }
}
