// Every section of the guide in one process, in its order. draining.mjs ends a server, so it comes last.
import './text-generation.mjs';
import './structured-output.mjs';
import './tools.mjs';
import './server-components.mjs';
import './hooks.mjs';
import './advanced-configuration.mjs';
import './guided-generation.mjs';
import './embeddings.mjs';
import './completion-model.mjs';
import './error-handling.mjs';
import './monitoring.mjs';
import './best-practices.mjs';
import './troubleshooting.mjs';
import './draining.mjs';
