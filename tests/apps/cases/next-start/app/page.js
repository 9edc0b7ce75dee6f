import { redirect } from 'next/navigation';
import Counter from './counter';

async function save(form) {
  'use server';
  redirect(`/saved?word=${encodeURIComponent(form.get('word'))}`);
}

export default function Page() {
  return (
    <>
      <Counter />
      <form action={save}>
        <label>
          word <input name="word" />
        </label>
        <button>save</button>
      </form>
    </>
  );
}
