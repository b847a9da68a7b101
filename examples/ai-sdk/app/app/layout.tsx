import type { Metadata } from 'next';
import type { ReactNode } from 'react';
import { Header } from '@/components/header';
import { Metrics } from '@/components/metrics';
import './globals.css';

export const metadata: Metadata = { title: 'minivllm · AI SDK', description: 'Chat, completion and objects' };

export default function Layout({ children }: { children: ReactNode }) {
  return (
    <html lang="en">
      <body>
        <Header />
        <main>{children}</main>
        <Metrics />
      </body>
    </html>
  );
}
