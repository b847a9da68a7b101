// The chat: text as it is made, tool calls as they run.
'use client';

import { useChat } from '@ai-sdk/react';
import { DefaultChatTransport } from 'ai';
import { useState } from 'react';
import { Composer } from '@/components/composer';
import { Message } from '@/components/message';
import { Trouble } from '@/components/trouble';
import type { ChatMessage } from '@/lib/tools';

const CHOICES = { off: 'no tools', auto: 'both tools', weather: 'first weather', calculator: 'first calculator' };
const transport = new DefaultChatTransport<ChatMessage>({ api: '/api/chat' });

export default function ChatPage() {
  const [tool, setTool] = useState('off');
  const { messages, sendMessage, regenerate, setMessages, clearError, status, stop, error } = useChat<ChatMessage>({
    transport,
    throttle: 30, // milliseconds between two paintings
  });
  const isBusy = status === 'submitted' || status === 'streaming';
  const last = messages.at(-1);

  function startAnew() {
    stop();
    setMessages([]);
    clearError();
  }

  return (
    <section className="chat">
      <div className="log">
        <div aria-live="polite">
          {messages.length === 0 && <Welcome onPick={setTool} />}
          {messages.map((message) => (
            <Message key={message.id} message={message} isGrowing={isBusy && message === last} />
          ))}
          {status === 'submitted' && <p className="thinking">The model reads …</p>}
          <Trouble error={error} onRetry={() => regenerate({ body: { tool } })} />
        </div>
      </div>
      <Composer
        label="Message"
        isBusy={isBusy}
        onSend={(text) => sendMessage({ text }, { body: { tool } })}
        onStop={stop}
        action="Send"
      >
        <select aria-label="Tools" value={tool} onChange={(event) => setTool(event.target.value)}>
          {Object.entries(CHOICES).map(([value, words]) => (
            <option key={value} value={value}>
              {words}
            </option>
          ))}
        </select>
        <button type="button" onClick={startAnew} disabled={messages.length === 0}>
          New chat
        </button>
      </Composer>
    </section>
  );
}

function Welcome({ onPick }: { onPick: (tool: string) => void }) {
  return (
    <div className="welcome">
      <h1>Talk with your own model</h1>
      <p>
        Every word comes from your own server. The model may call two tools:{' '}
        <button type="button" onClick={() => onPick('weather')}>
          weather
        </button>{' '}
        and{' '}
        <button type="button" onClick={() => onPick('calculator')}>
          calculator
        </button>
        . A very small model calls one only when it has to.
      </p>
    </div>
  );
}
