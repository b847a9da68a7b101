// A tool call in each of its states: being written by the model, running here, done, failed, or stopped before.
import type { ChatMessage } from '@/lib/tools';

type Part = Extract<ChatMessage['parts'][number], { type: 'tool-weather' | 'tool-calculator' }>;

const STATES: Record<string, string> = {
  'input-streaming': 'is being called',
  'input-available': 'running',
  'output-available': 'done',
  'output-error': 'failed',
};

export function ToolCall({ part, isGrowing }: { part: Part; isGrowing: boolean }) {
  const wasStopped = !isGrowing && part.state.startsWith('input-');
  return (
    <div className="tool" data-state={part.state}>
      <p>
        <b>{part.type.replace('tool-', '')}</b> <span className="state">{wasStopped ? 'stopped' : STATES[part.state]}</span>
      </p>
      {part.input && <code className="input">{JSON.stringify(part.input)}</code>}
      {part.state === 'output-available' && <code className="output">{JSON.stringify(part.output)}</code>}
      {part.state === 'output-error' && <code className="output bad">{part.errorText}</code>}
    </div>
  );
}
