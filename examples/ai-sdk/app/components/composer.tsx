// The field at the bottom of every page. Enter sends, Shift + Enter begins a line; Escape or the button stops, and so
// does leaving the page.
'use client';

import { useEffect, useRef, useState, type KeyboardEvent, type ReactNode } from 'react';

type Props = {
  label: string;
  action: string;
  isBusy: boolean;
  onSend: (text: string) => void;
  onStop: () => void;
  keepsText?: boolean;
  children?: ReactNode; // settings, beside the button
};

export function Composer({ label, action, isBusy, onSend, onStop, keepsText = false, children }: Props) {
  const [text, setText] = useState('');
  const canSend = !isBusy && text.trim() !== '';

  const stop = useRef(onStop);
  useEffect(() => {
    stop.current = onStop;
  });
  useEffect(() => () => stop.current(), []);

  function send() {
    if (!canSend) return;
    onSend(text);
    if (!keepsText) setText('');
  }

  function onKeyDown(event: KeyboardEvent) {
    if (event.key === 'Escape' && isBusy) onStop();
    if (event.key !== 'Enter' || event.shiftKey || event.nativeEvent.isComposing) return;
    event.preventDefault();
    send();
  }

  return (
    <form
      className="composer"
      onSubmit={(event) => {
        event.preventDefault();
        send();
      }}
    >
      <textarea
        aria-label={label}
        placeholder={label}
        rows={1}
        value={text}
        onChange={(event) => setText(event.target.value)}
        onKeyDown={onKeyDown}
        autoFocus
      />
      <div className="row">
        {children}
        {isBusy ? (
          <button key="stop" type="button" className="primary" onClick={onStop}>
            Stop
          </button>
        ) : (
          <button key="send" type="submit" className="primary" disabled={!canSend}>
            {action}
          </button>
        )}
      </div>
    </form>
  );
}
