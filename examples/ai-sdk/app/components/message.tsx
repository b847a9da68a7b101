// One turn of the conversation: its text, its tool calls, and how it came about.
import type { ChatMessage } from '@/lib/tools';
import { ToolCall } from './tool-call';

export function Message({ message, isGrowing }: { message: ChatMessage; isGrowing: boolean }) {
  return (
    <article className={`message ${message.role}`}>
      {message.parts.map((part, index) => {
        switch (part.type) {
          case 'text':
            return (
              <p key={index} className="text">
                {part.text}
                {isGrowing && part.state === 'streaming' && <span className="caret" />}
              </p>
            );
          case 'reasoning':
            return (
              <details key={index} className="reasoning">
                <summary>Reasoning</summary>
                {part.text}
              </details>
            );
          case 'tool-weather':
          case 'tool-calculator':
            return <ToolCall key={part.toolCallId} part={part} isGrowing={isGrowing} />;
        }
      })}
      {message.role === 'assistant' && !isGrowing && <p className="facts">{factsOf(message)}</p>}
    </article>
  );
}

// No facts: the answer never came to its end.
function factsOf({ metadata }: ChatMessage): string {
  if (!metadata) return 'broken off';
  const { inputTokens, outputTokens, seconds, finishReason } = metadata;
  const speed = (outputTokens / seconds).toFixed(1);
  const ending = finishReason === 'length' ? ' · cut at the limit' : '';
  return `${inputTokens} tokens read · ${outputTokens} written · ${speed} tok/s${ending}`;
}
