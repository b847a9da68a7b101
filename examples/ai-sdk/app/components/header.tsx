'use client';

import Link from 'next/link';
import { usePathname } from 'next/navigation';

const PAGES = { '/': 'Chat', '/completion': 'Completion', '/object': 'Object' };

export function Header() {
  const path = usePathname();
  return (
    <header>
      <strong>minivllm</strong>
      <nav>
        {Object.entries(PAGES).map(([href, name]) => (
          <Link key={href} href={href} aria-current={path === href ? 'page' : undefined}>
            {name}
          </Link>
        ))}
      </nav>
    </header>
  );
}
